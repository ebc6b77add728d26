"""The corpus table: which tokens followed which, in one compact file that is mapped, not read.

Layout (little endian): magic, version, length of a JSON header, the header, then arrays at 64-byte boundaries.

    tri_slots  uint64 [2 * capacity]  open-addressing hash of contexts of two and three tokens: key, row; key 0 is empty
    bi_rows    uint64 [V]             row of each single token
    uni        uint32 [top_k]         the most frequent tokens
    entries    uint32 [n]             token << 12 | probability in 1/4095, best first within a row

A row packs into 64 bits where its entries start, how many they are, and how often its context was seen (log scale).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drafters.base import Float32, Uint32, Uint64
from drafters.compiled import compiled, inlined

MAGIC = b"FTKNTRI\0"
VERSION = 1
PROBABILITY_BITS = 12
PROBABILITY_UNITS = (1 << PROBABILITY_BITS) - 1
MAX_VOCAB = 1 << (32 - PROBABILITY_BITS)
"""Token ids must fit beside the probability."""
LONG_CONTEXT = 1 << 44
"""Set in the keys of contexts of three tokens."""
_ALIGN = 64
_HEADER_BYTES = 4096
"""Room for all before the arrays, so that offsets do not depend on the length of the header."""
COUNTS: Float32 = (2.0 ** (np.arange(256) / 8.0) - 1).astype(np.float32)
"""The count behind each log-scale value: 8 steps per doubling, so 8 bits reach 2 ** 31."""
_DTYPES = {"tri_slots": np.uint64, "bi_rows": np.uint64, "uni": np.uint32, "entries": np.uint32}

Corpus = tuple[Uint64, Uint64, Uint32, Uint32]
"""What the compiled search reads: tri_slots, bi_rows, uni, entries."""


class TableError(Exception):
    """A table that cannot be read, written or used here; the message is one line for the operator."""


def tokenizer_fingerprint(vocab: dict[str, int]) -> str:
    """SHA-256 over the vocabulary: the same for every copy of one tokenizer, whatever its folder is called."""
    content = json.dumps(sorted(vocab.items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("ascii")).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class TableInfo:
    """What the header says of a table."""

    fingerprint: str
    tokenizer: str
    """Name of the model or tokenizer the table was built for, for people."""
    vocab_size: int
    top_k: int
    num_tokens: int
    num_documents: int
    num_bigrams: int
    num_contexts: int
    """Contexts of two tokens kept."""
    num_long_contexts: int
    """Contexts of three tokens kept."""
    num_entries: int


@inlined
def mix(value: Any) -> Any:
    """Finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): spreads keys over a hash table."""
    value = np.uint64(value)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@inlined
def context_key(first: int, second: int) -> Any:
    """Key of the context (first, second); never 0."""
    return (np.uint64(first) << np.uint64(20) | np.uint64(second)) + np.uint64(1)


@inlined
def long_context_key(first: int, second: int, third: int) -> Any:
    """Key of the context (first, second, third): 44 bits of its hash, apart from all keys of two tokens."""
    joined = np.uint64(first) << np.uint64(40) | np.uint64(second) << np.uint64(20) | np.uint64(third)
    return mix(joined) >> np.uint64(20) | np.uint64(LONG_CONTEXT)


def long_context_keys(pairs: Uint64, thirds: Uint64) -> Uint64:
    """`long_context_key` of many contexts: pairs hold first << 20 | second, [n] each."""
    keys: Uint64 = mix.py_func(pairs << np.uint64(20) | thirds) >> np.uint64(20)  # type: ignore[attr-defined]
    return keys | np.uint64(LONG_CONTEXT)


@compiled
def find_row(tri_slots: Uint64, key: Any) -> Any:
    """The packed row of a context, or 0 when the table has none."""
    capacity = tri_slots.size >> 1
    key = np.uint64(key)
    slot = np.int64(mix(key) & np.uint64(capacity - 1))
    for _ in range(capacity):
        held = tri_slots[2 * slot]
        if held == key:
            return tri_slots[2 * slot + 1]
        if held == np.uint64(0):
            return np.uint64(0)
        slot = (slot + 1) & (capacity - 1)
    return np.uint64(0)


@compiled
def insert_rows(tri_slots: Uint64, keys: Uint64, rows: Uint64) -> None:
    """Place rows under distinct keys; `tri_slots` must have room."""
    capacity = tri_slots.size >> 1
    for index in range(keys.size):
        slot = np.int64(mix(keys[index]) & np.uint64(capacity - 1))
        while tri_slots[2 * slot] != np.uint64(0):
            slot = (slot + 1) & (capacity - 1)
        tri_slots[2 * slot] = keys[index]
        tri_slots[2 * slot + 1] = rows[index]


def capacity_for(num_contexts: int) -> int:
    """Slots of the hash table: the power of two that leaves at least a third of them empty."""
    return 1 << max(4, math.ceil(math.log2(1.5 * max(1, num_contexts))))


@dataclass(frozen=True, slots=True)
class Table:
    """An open table. Owns nothing but read-only views of the file."""

    info: TableInfo
    corpus: Corpus

    @classmethod
    def open(cls, path: str | Path, fingerprint: str | None = None) -> Table:
        """Map a table.

        Raises: TableError when it is missing, not a table, of another version, cut short, or when `fingerprint` is
        given and the table was made for another tokenizer.
        """
        path = Path(path)
        info, spans = read_header(path)
        if fingerprint is not None and info.fingerprint != fingerprint:
            raise TableError(
                f"{path}: this tri-gram table was built for the tokenizer of {info.tokenizer!r} "
                f"({info.fingerprint[:12]}), not for this model's ({fingerprint[:12]})"
            )
        # A plain ndarray view: the compiled code has one signature for mapped and empty tables.
        content = np.memmap(path, mode="r").view(np.ndarray)
        tri, bi, uni, entries = (
            content[offset : offset + length * np.dtype(dtype).itemsize].view(dtype)
            for dtype, (offset, length) in zip(_DTYPES.values(), spans.values(), strict=True)
        )
        return cls(info, (tri, bi, uni, entries))


def empty_corpus() -> Corpus:
    """A table that knows nothing: on-line learning only. Read-only, as a mapped one is."""
    slots, none = np.zeros(4, np.uint64), np.zeros(0, np.uint32)
    slots.flags.writeable = none.flags.writeable = False
    return slots, slots[:0], none, none


def layout(lengths: dict[str, int], info: TableInfo) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """Where everything lies. Returns: the bytes before the arrays, (offset, length) by array, size of the file."""
    spans: dict[str, tuple[int, int]] = {}
    offset = _HEADER_BYTES
    for name, dtype in _DTYPES.items():
        spans[name] = (offset, lengths[name])
        size = lengths[name] * np.dtype(dtype).itemsize
        offset = -(-(offset + size) // _ALIGN) * _ALIGN
    text = json.dumps({"info": asdict(info), "arrays": spans, "file_size": offset}).encode()
    head = MAGIC + struct.pack("<II", VERSION, len(text)) + text
    assert len(head) <= _HEADER_BYTES, f"table header of {len(head)} bytes"
    return head.ljust(_HEADER_BYTES, b"\0"), spans, offset


def read_header(path: Path) -> tuple[TableInfo, dict[str, tuple[int, int]]]:
    """The header of a table, checked against the file. Raises: TableError."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise TableError(f"{path}: cannot read the tri-gram table: {error.strerror}") from error
    if len(head) < len(MAGIC) + 8 or head[: len(MAGIC)] != MAGIC:
        raise TableError(f"{path}: not a tri-gram table")
    version, length = struct.unpack_from("<II", head, len(MAGIC))
    if version != VERSION:
        raise TableError(
            f"{path}: tri-gram table of version {version}, this program reads version {VERSION}: build it again"
        )
    try:
        body = json.loads(head[len(MAGIC) + 8 :][:length])
        info = TableInfo(**body["info"])
        spans = {name: (int(body["arrays"][name][0]), int(body["arrays"][name][1])) for name in _DTYPES}
        expected = int(body["file_size"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TableError(f"{path}: the header of the tri-gram table is broken, or the file was cut short") from error
    if size != expected:
        raise TableError(f"{path}: the tri-gram table has {size} bytes instead of {expected}: it was cut short")
    slots = spans["tri_slots"][1]
    is_sound = slots >= 4 and slots & (slots - 1) == 0 and 0 < spans["bi_rows"][1] == info.vocab_size <= MAX_VOCAB
    for name, (offset, length) in spans.items():
        stop = offset + length * np.dtype(_DTYPES[name]).itemsize
        is_sound = is_sound and offset >= 0 and length >= 0 and stop <= size
    if not is_sound:
        raise TableError(f"{path}: the header of the tri-gram table does not fit its arrays")
    return info, spans
