"""Which weights a target has, told from a part of them: what was trained for one target must not serve another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from verifier.model import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SAMPLE_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def model_fingerprint(model: str, revision: str = "") -> str:
    """Names the weights of a folder or Hub id, in hexadecimal.

    SHA-256 over name, type, shape and 512 bytes from the middle of every tensor, in the order of the file names. So it
    is quick for any size, the same for every copy, and another one if training changed any tensor as a whole; a tensor
    changed in few places may go unseen. Reads the files that are loaded: model.safetensors, else those its index names.
    Raises: ModelError with one line if there are none or they are broken.
    """
    digest = hashlib.sha256()
    for path in _weight_files(model, revision):
        try:
            with path.open("rb", buffering=0) as file:
                for tensor in _tensors(file.fileno()):
                    digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
                    digest.update(_sample(file.fileno(), tensor))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"cannot read the weights in {path}: {' '.join(str(error).split())}") from error
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    """Bytes start .. stop - 1 of the file."""


def _weight_files(model: str, revision: str) -> list[Path]:
    """The files with the weights, by name. Raises: ModelError."""
    path = Path(model).expanduser()
    get = _in_folder(path) if path.is_dir() else _on_hub(model, revision)
    single = get(_SINGLE)
    if single is not None:
        return [single]
    index = get(_INDEX)
    if index is None:
        raise ModelError(f"{model!r} has no weights as safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot read {index}: {' '.join(str(error).split())}") from error
    files = [(name, get(name)) for name in names]
    missing = [name for name, file in files if file is None]
    if missing:
        raise ModelError(f"{model!r} lacks {missing[0]}, which its index names")
    return [file for _, file in files if file is not None]


def _in_folder(folder: Path) -> Callable[[str], Path | None]:
    def get(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return get


def _on_hub(model: str, revision: str) -> Callable[[str], Path | None]:
    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(model, name, revision=revision or None))
        except LocalEntryNotFoundError as error:  # nobody could say whether there is such a file
            raise ModelError(f"cannot get {model!r} from the Hub: {_first_line(error)}") from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ModelError(f"cannot get {model!r} from the Hub: {_first_line(error)}") from error

    return get


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tensors(file: int) -> list[_Tensor]:
    """The header's entries by name; its metadata, which anybody may rewrite, do not count. Raises: ValueError."""
    size = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 2 <= size <= _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(os.pread(file, size, 8))
    found = []
    for name, entry in sorted(header.items()):
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found.append(_Tensor(name, entry["dtype"], tuple(entry["shape"]), 8 + size + start, 8 + size + stop))
    return found


def _sample(file: int, tensor: _Tensor) -> bytes:
    """Bytes from the middle of a tensor, all of a small one. Raises: ValueError if the file ends before."""
    num_bytes = min(_SAMPLE_BYTES, tensor.stop - tensor.start)
    start = tensor.start + (tensor.stop - tensor.start - num_bytes) // 2
    sample = os.pread(file, num_bytes, start)
    if len(sample) < num_bytes:
        raise ValueError(f"the file ends within {tensor.name}")
    return sample
