"""The header of a GGUF file, walked before any library reads it: what cannot be right is told, and nothing grows.

The libraries trust the counts and lengths in the file. The package gguf, for one, walks an array past the end of the
file until memory runs out. After this walk every count, length and offset is known to lie within the file.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
"""Version 1 counted in 32 bits; no file of it is left."""
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Of a value's type: how it is written, where that has a fixed size."""
_MOST_ENTRIES = 65_536
"""Fields, and tensors: the largest mixtures of experts have some thousand tensors."""
_MOST_ELEMENTS = 2**22
"""Elements of all arrays: the largest vocabulary has 262 thousand tokens, in four arrays. The package gguf makes two
objects of 100 bytes of each."""
_MOST_DIMENSIONS = 4
_USUAL_ALIGNMENT, _MOST_ALIGNMENT = 32, 2**20


class GgufError(ValueError):
    """The file is broken, or not of this format; the message is one line, without the file's name."""


Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a walk through the header finds."""

    values: dict[str, Value]
    """Fields with one value; arrays are left out."""
    num_tensors: int
    num_elements: int
    """Weights of all tensors."""

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.values["general.architecture"])


def read_header(file: Path, block_sizes: dict[int, tuple[int, int]]) -> GgufHeader:
    """Walk the header of `file`.

    Args: `block_sizes` tells of each tensor type how many weights a block has, and how many bytes.
    Raises: GgufError, OSError.
    """
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise GgufError("it is not a GGUF file: it does not begin with GGUF")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data).header(block_sizes)


class _Walk:
    """One walk through the mapped file. Owns the place that it has come to."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(MAGIC)
        self._num_elements_left = _MOST_ELEMENTS

    def header(self, block_sizes: dict[int, tuple[int, int]]) -> GgufHeader:
        """The whole header. Raises: GgufError."""
        (version,) = self._take("<I")
        if version not in _VERSIONS:
            if version in (value << 24 for value in _VERSIONS):
                raise GgufError("it is written for big-endian machines: get the little-endian file")
            raise GgufError(f"it is GGUF version {version}; versions 2 and 3 can be read")
        num_tensors, num_fields = self._take("<QQ")
        for what, count in (("tensors", num_tensors), ("fields", num_fields)):
            if count > _MOST_ENTRIES:
                raise GgufError(f"it is broken: a header with {count:,} {what}, the limit is {_MOST_ENTRIES:,}")
        values: dict[str, Value] = {}
        for _ in range(num_fields):
            name = self._string()
            value = self._value(name, *self._take("<I"))
            if value is not None:
                values[name] = value
        _check_values(values, num_tensors)
        tensors = [self._tensor(block_sizes) for _ in range(num_tensors)]
        self._check_end(tensors, int(values.get("general.alignment", _USUAL_ALIGNMENT)))
        return GgufHeader(values, num_tensors, sum(num_elements for num_elements, _ in tensors))

    def _take(self, form: str) -> tuple[int, ...]:
        start = self._at
        self._skip(struct.calcsize(form))
        return struct.unpack_from(form, self._data, start)

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._at:
            raise GgufError(_cut_off(self._at + num_bytes, len(self._data)))
        self._at += num_bytes

    def _string(self) -> str:
        start = self._at + 8
        self._skip(*self._take("<Q"))
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError:
            raise GgufError(f"it is broken: the text at byte {start:,} is not UTF-8") from None

    def _value(self, name: str, kind: int) -> Value | None:
        """The value of a field; None of an array, which is passed over."""
        if kind in _FORMATS:
            return self._take(_FORMATS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise GgufError(f"it is broken: {name!r:.80} is of type {kind}, known are 0 to {max(_FORMATS)}")
        inner, count = self._take("<IQ")
        self._num_elements_left -= count
        if self._num_elements_left < 0:
            raise GgufError(
                f"it is broken: {name!r:.80}: the arrays up to it have more than {_MOST_ELEMENTS:,} elements"
            )
        if inner in _FORMATS:
            self._skip(count * struct.calcsize(_FORMATS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self._skip(*self._take("<Q"))
        else:
            raise GgufError(f"it is broken: {name!r:.80} holds elements of type {inner}, which cannot be read")
        return None

    def _tensor(self, block_sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """Of one entry: how many weights, and where its bytes end in the data behind the header."""
        name = self._string()
        (num_dimensions,) = self._take("<I")
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            raise GgufError(
                f"it is broken: tensor {name!r:.80} has {num_dimensions} dimensions, must be 1 to {_MOST_DIMENSIONS}"
            )
        shape = self._take(f"<{num_dimensions}Q")
        kind, offset = self._take("<IQ")
        if kind not in block_sizes:
            raise GgufError(f"tensor {name!r:.80} is of type {kind}, which the package gguf does not know: update it")
        width, num_bytes = block_sizes[kind]
        if shape[0] % width:
            raise GgufError(
                f"it is broken: tensor {name!r:.80} has rows of {shape[0]} weights, must be a multiple of {width}"
            )
        return prod(shape), offset + prod(shape) // width * num_bytes

    def _check_end(self, tensors: list[tuple[int, int]], alignment: int) -> None:
        start = -(-self._at // alignment) * alignment
        end = start + max((end for _, end in tensors), default=0)
        if end > len(self._data):
            raise GgufError(_cut_off(end, len(self._data)))


def _check_values(values: dict[str, Value], num_tensors: int) -> None:
    """What the libraries take for granted. Raises: GgufError."""
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        what = "missing" if architecture is None else f"{architecture!r:.80}, not a text"
        raise GgufError(f"it is broken: general.architecture is {what}")
    alignment = values.get("general.alignment", _USUAL_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MOST_ALIGNMENT:
        raise GgufError(f"it is broken: general.alignment is {alignment!r:.80}, must be 1 to {_MOST_ALIGNMENT:,}")
    if (values.get("split.count") or 1) != 1:
        raise GgufError(
            f"it is one of {values['split.count']!r:.80} parts: join them with llama.cpp's `llama-gguf-split --merge`"
        )
    layers = f"{architecture}.block_count"
    num_layers = values.get(layers, 0)
    if type(num_layers) is not int or not 0 <= num_layers <= num_tensors:
        raise GgufError(
            f"it is broken: {layers!r:.80} is {num_layers!r:.80}, must be 0 to {num_tensors:,}, the number of tensors"
        )


def _cut_off(wanted: int, size: int) -> str:
    return f"it ends at byte {size:,} and has to go on to {wanted:,} at least: broken, or a download that was cut off"
