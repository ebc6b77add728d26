"""Where this user keeps what takes time at start: code that is compiled, tokenizers that are read, weights converted.

What is loaded from there must be nobody else's to write. Imports no torch before it must.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

_TORCH_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def private_folder() -> Path:
    """For what takes seconds, made on first use. Raises: OSError if somebody else could have put files there."""
    path = Path(tempfile.gettempdir()) / f"foretoken-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return _of_this_user(path)


def cache_folder() -> Path:
    """For what takes minutes and gigabytes: $XDG_CACHE_HOME/foretoken, else ~/.cache/foretoken. Raises: as above.

    The temporary folder may lie in memory, and is empty after a restart of the machine.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:  # a user without a home
        raise OSError(str(error)) from None
    path = base / "foretoken"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _of_this_user(path)


def _of_this_user(path: Path) -> Path:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{path} is not a directory of this user's alone")
    return path


def keep_compiled_graphs() -> None:
    """Let torch keep what it compiles there too, unless the environment names a place. Raises: OSError.

    Torch itself writes its default into the environment when parts of it are imported, and anybody may have made that
    folder before.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get(_TORCH_VARIABLE) in (None, os.path.abspath(default_cache_dir())):
        os.environ[_TORCH_VARIABLE] = str(private_folder() / "inductor")
