"""A GGUF file as a model: converted once into a folder in Hugging Face format, which all the rest reads like any other.

The conversion needs torch and transformers, and so runs in a process of its own (server.gguf_child).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from server.child_environment import child_environment
from server.errors import StartupError
from server.gguf_header import MAGIC
from verifier.private_folder import cache_folder

SUFFIX = ".gguf"
CHILD_COMMAND = (sys.executable, "-P", "-m", "server.gguf_child")
SIZES = "foretoken-files.json"
"""In a converted folder: the sizes of its other files, by name."""
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
    try:
        file = find(model)
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder that may not be read, ~nobody
        raise StartupError(f"cannot look for the model {model[:200]}: {error}") from None
    if file is None:
        return model
    with _reading(file):
        key = file_key(file)
    try:
        folder = _folder_of(file, key)
    except OSError as error:
        raise StartupError(
            f"{file}: cannot keep its weights as safetensors: {error}; XDG_CACHE_HOME names another place for caches"
        ) from None
    if not is_whole(folder):
        _convert(file, folder, key, tell)
    return str(folder)


def find(model: str) -> Path | None:
    """The GGUF file that `model` names, itself or as the only one of a folder; None for other models.

    Raises: StartupError for a file that is none or cannot be read, a missing one, and a folder with several; OSError.
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


def is_whole(folder: Path) -> bool:
    """Whether a conversion is there with all of its files, none of them cut short."""
    try:
        sizes = msgspec.json.decode((folder / SIZES).read_bytes(), type=dict[str, int])
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, msgspec.DecodeError):
        return False


def note_sizes(folder: Path) -> None:
    """Write down which files a conversion has, when it has all of them. Raises: OSError."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / SIZES).write_bytes(msgspec.json.encode(sizes))


def file_key(file: Path) -> str:
    """Changes whenever the file is written to. Raises: OSError."""
    found = file.stat()
    return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Tell a failure to read the model's file from one to write to the cache. Raises: StartupError."""
    try:
        yield
    except OSError as error:
        raise StartupError(f"{file}: cannot read it: {error.strerror or error}") from None


def _has_magic(path: Path) -> bool:
    with _reading(path), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _folder_of(file: Path, key: str) -> Path:
    """Where the conversion of this content by these libraries is kept.

    Raises: OSError of the cache, StartupError where the file cannot be read.
    """
    cache = cache_folder() / "gguf"
    cache.mkdir(exist_ok=True)
    digest = _digest(file, cache / f"digest-{hashlib.sha256(key.encode()).hexdigest()[:32]}")
    made = f"{_FORMAT} {version('transformers')} {digest}"
    return cache / hashlib.sha256(made.encode()).hexdigest()[:32] / (file.stem.lstrip(".") or "model")


def _digest(file: Path, note: Path) -> str:
    """SHA-256 of the content; reading 10 GB takes ten seconds, so it is noted. Raises: OSError, StartupError."""
    with contextlib.suppress(OSError, ValueError):
        known = note.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", known):  # a power cut leaves zeros
            return known
    with _reading(file), file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    note.write_text(digest, encoding="ascii")
    return digest


def _convert(file: Path, folder: Path, key: str, tell: Callable[[str], None]) -> None:
    """Have a child make the folder, with the file as `key` knows it. Raises: StartupError."""
    with _reading(file):
        size = file.stat().st_size
    tell(f"converting {file} ({size / 1e6:,.0f} MB) to safetensors")
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
