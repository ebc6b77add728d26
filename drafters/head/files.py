"""Writing files whole or not at all, and reading tensor files that may have been cut short."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor


class FileError(Exception):
    """A file that cannot be written or read; the message is one line that names it."""


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Put `data` at `path` so that a crash leaves the old file or the new one, never a part.

    `mode` says who may read it, as far as the umask lets them. Raises: FileError, when the disk is full for one; what
    stood at `path` is still there, and no leftovers are.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")  # another process may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)  # of a process that was killed, or a link: it would keep its mode, or lead away
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name lasts
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """An object as a JSON file, whole or not at all. Raises: FileError."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: FileError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} does not hold a JSON object")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all. Raises: FileError."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(packed, dict(metadata)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All of a safetensors file and its metadata. Raises: FileError when it is missing, foreign or cut short."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"{path} is damaged or no safetensors file: {' '.join(str(error).split())}") from error
