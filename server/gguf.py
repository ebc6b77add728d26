"""A GGUF file as a model: converted once into a folder in Hugging Face format, which all the rest reads like any other.

The conversion needs torch and transformers, and so runs in a process of its own (server.gguf_child).
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec

from server.child_environment import child_environment
from server.errors import StartupError
from server.gguf_header import MAGIC
from verifier.private_folder import cache_folder

SUFFIX = ".gguf"
CHILD_COMMAND = (sys.executable, "-P", "-m", "server.gguf_child")
_FORMAT = 1
"""Of the converted folder: raise it when the same file would give another folder."""


class Converted(msgspec.Struct, frozen=True, tag="converted"):
    """The folder is there."""


class Unconvertible(msgspec.Struct, frozen=True, tag="unconvertible"):
    """Why there is no folder."""

    reason: str


def _tell(line: str) -> None:
    print(f"foretoken: {line}", file=sys.stderr, flush=True)


def resolve(model: str, tell: Callable[[str], None] = _tell) -> str:
    """The model that is to be loaded where `model` was named: for a GGUF file, or a folder with one, its conversion.

    Converts at the first call for a file, and takes the user's patience for that; `tell` hears of it. The folder is
    called as the file is, without its ending. Raises: StartupError in one line.
    """
    file = find(model)
    if file is None:
        return model
    try:
        key = file_key(file)
        folder = _folder_of(file, key)
    except OSError as error:
        raise StartupError(
            f"{file}: cannot keep its weights as safetensors: {error}; XDG_CACHE_HOME names another place for caches"
        ) from None
    if not folder.is_dir():
        _convert(file, folder, key, tell)
    return str(folder)


def find(model: str) -> Path | None:
    """The GGUF file that `model` names, itself or as the only one of a folder; None for other models.

    Raises: StartupError for a file that is none, a missing one, and a folder with several.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != SUFFIX and not _has_magic(path):
            raise StartupError(f"{model} is neither a folder nor a GGUF file")
        return path
    if not path.is_dir():
        if path.suffix.lower() == SUFFIX:
            raise StartupError(f"there is no file {model}")
        return None
    if not model or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(found for found in path.iterdir() if found.suffix.lower() == SUFFIX and found.is_file())
    if len(files) > 1:
        raise StartupError(f"{model} holds {len(files)} GGUF files: name one of {', '.join(f.name for f in files)}")
    return files[0] if files else None


def file_key(file: Path) -> str:
    """Changes whenever the file is written to. Raises: OSError."""
    found = file.stat()
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _folder_of(file: Path, key: str) -> Path:
    """Where the conversion of this content by these libraries is kept. Raises: OSError."""
    cache = cache_folder() / "gguf"
    cache.mkdir(exist_ok=True)
    digest = _digest(file, cache / f"digest-{hashlib.sha256(key.encode()).hexdigest()[:32]}")
    made = f"{_FORMAT} {version('transformers')} {digest}"
    return cache / hashlib.sha256(made.encode()).hexdigest()[:32] / (file.stem.lstrip(".") or "model")


def _digest(file: Path, note: Path) -> str:
    """SHA-256 of the content; reading 10 GB takes ten seconds, so it is noted. Raises: OSError."""
    with contextlib.suppress(OSError):
        known = note.read_text(encoding="ascii")
        if len(known) == 64:
            return known
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    note.write_text(digest, encoding="ascii")
    return digest


def _convert(file: Path, folder: Path, key: str, tell: Callable[[str], None]) -> None:
    """Have a child make the folder, with the file as `key` knows it. Raises: StartupError."""
    tell(f"converting {file} ({file.stat().st_size / 1e6:,.0f} MB) to safetensors")
    start = time.monotonic()
    done = subprocess.run(
        [*CHILD_COMMAND, str(file), str(folder), key],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=child_environment() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    try:
        answer = msgspec.json.decode(done.stdout, type=Converted | Unconvertible)
    except msgspec.DecodeError:
        if done.returncode == -9:
            reason = "the process that converts it was killed, as happens where memory runs out"
        else:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            reason = f"the process that converts it ended with {done.returncode}: {words[-1] if words else ''}"
        raise StartupError(f"{file}: {reason}") from None
    if isinstance(answer, Unconvertible):
        raise StartupError(f"{file}: {answer.reason}")
    tell(f"converted {file.name} to safetensors in {time.monotonic() - start:.0f} s; the next start reads {folder}")
