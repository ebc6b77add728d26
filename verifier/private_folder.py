"""Where this user keeps what is compiled at start: code that is loaded must be nobody else's to write."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path:
    """The folder, made on first use. Raises: OSError if somebody else could have put files there."""
    path = Path(tempfile.gettempdir()) / f"foretoken-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{path} is not a directory of this user's alone")
    return path


def keep_compiled_graphs() -> None:
    """Let torch keep what it compiles there too, unless the environment names a place. Raises: OSError."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder() / "inductor")
