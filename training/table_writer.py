"""Writing a corpus table: pruned rows stream to disk, then the file is put together and moved into place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drafters.ngram.table import (
    PROBABILITY_BITS,
    PROBABILITY_UNITS,
    TableInfo,
    capacity_for,
    insert_rows,
    layout,
)

Uint64 = NDArray[np.uint64]
Uint32 = NDArray[np.uint32]
_CHUNK_BYTES = 1 << 22


class TableWriter:
    """Collects the rows of a table.

    Owns the spill files `entries`, `keys` and `rows` in `folder` until `finish`. Raises OSError when the disk is full.
    """

    def __init__(self, folder: Path, top_k: int):
        self._folder = folder
        self._top_k = top_k
        self._num_entries = 0
        self._num_contexts = 0
        self._num_long = 0
        self._uni = np.zeros(0, np.uint32)
        self._bi_rows = np.zeros(0, np.uint64)
        for name in ("entries", "keys", "rows"):
            (folder / name).touch()

    def add_unigrams(self, counts: NDArray[np.int64]) -> None:
        """The most frequent tokens, from counts [V]."""
        best = np.argsort(-counts, kind="stable")[: self._top_k]
        best = best[counts[best] > 0]
        share = counts[best] / counts.sum()
        self._uni = _pack(best.astype(np.uint64), share)

    def add_rows(self, contexts: Uint64, tokens: Uint64, seen: Uint64, min_count: int) -> tuple[Uint64, Uint64]:
        """Prune and keep the rows of whole contexts that were seen at least `min_count` times.

        Args: [n] each, contexts ascending. Returns: the kept contexts and their packed rows, [c] each.
        """
        starts = np.flatnonzero(np.concatenate(([True], contexts[1:] != contexts[:-1])))
        sizes = np.diff(np.append(starts, contexts.size))
        totals = np.add.reduceat(seen, starts)  # [contexts]
        owner = np.repeat(np.arange(starts.size), sizes)  # [n] which context
        share = seen / totals[owner]
        order = np.lexsort((-share, owner))
        rank = np.arange(contexts.size) - starts[owner]  # rank within the context, once ordered
        wanted = totals >= min_count
        keep = (rank < self._top_k) & (np.rint(share[order] * PROBABILITY_UNITS) >= 1) & wanted[owner]
        order, owner = order[keep], owner[keep]
        with (self._folder / "entries").open("ab") as file:
            file.write(_pack(tokens[order], share[order]).data)
        lengths = np.bincount(owner, minlength=starts.size)
        kept = lengths > 0
        offsets = self._num_entries + np.cumsum(lengths) - lengths
        self._num_entries += int(order.size)
        return contexts[starts][kept], _pack_rows(offsets[kept], lengths[kept], totals[kept])

    def set_bigrams(self, rows: Uint64) -> None:
        """The packed row of every token, [V]."""
        self._bi_rows = rows

    def add_contexts(self, keys: Uint64, rows: Uint64, *, are_long: bool = False) -> None:
        """Keep contexts of two tokens, or three if `are_long`, by their keys in the table, with their packed rows."""
        self._num_contexts += int(keys.size)
        self._num_long += int(keys.size) if are_long else 0
        for name, array in (("keys", keys), ("rows", rows)):
            with (self._folder / name).open("ab") as file:
                file.write(array.data)

    def finish(self, out: Path, *, fingerprint: str, tokenizer: str, num_tokens: int, num_documents: int) -> TableInfo:
        """Put the file together next to `out` and move it there."""
        info = TableInfo(
            fingerprint=fingerprint,
            tokenizer=tokenizer[:500],
            vocab_size=int(self._bi_rows.size),
            top_k=self._top_k,
            num_tokens=num_tokens,
            num_documents=num_documents,
            num_bigrams=int(np.count_nonzero(self._bi_rows)),
            num_contexts=self._num_contexts - self._num_long,
            num_long_contexts=self._num_long,
            num_entries=self._num_entries,
        )
        lengths = {
            "tri_slots": 2 * capacity_for(self._num_contexts),
            "bi_rows": int(self._bi_rows.size),
            "uni": int(self._uni.size),
            "entries": self._num_entries,
        }
        head, spans, size = layout(lengths, info)
        draft = self._folder / "table"
        _write_zeros(draft, size)
        with draft.open("r+b") as file:
            file.write(head)
            for name, array in (("bi_rows", self._bi_rows), ("uni", self._uni)):
                file.seek(spans[name][0])
                file.write(array.data)
            file.seek(spans["entries"][0])
            _copy(self._folder / "entries", file)
        self._insert(draft, *spans["tri_slots"])
        with draft.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(draft, out)
        return info

    def _insert(self, draft: Path, offset: int, length: int) -> None:
        slots = np.memmap(draft, np.uint64, "r+", offset=offset, shape=(length,))
        step = _CHUNK_BYTES // 8
        for start in range(0, self._num_contexts, step):
            count = min(step, self._num_contexts - start)
            keys = np.fromfile(self._folder / "keys", np.uint64, count=count, offset=8 * start)
            rows = np.fromfile(self._folder / "rows", np.uint64, count=count, offset=8 * start)
            insert_rows(slots.view(np.ndarray), keys, rows)
        slots.flush()


def _pack(tokens: Uint64, share: NDArray[np.float64]) -> Uint32:
    units = np.maximum(1, np.rint(share * PROBABILITY_UNITS)).astype(np.uint32)
    return tokens.astype(np.uint32) << np.uint32(PROBABILITY_BITS) | units


def _pack_rows(offsets: NDArray[np.int64], lengths: NDArray[np.int64], totals: Uint64) -> Uint64:
    counts = np.minimum(255, np.rint(8.0 * np.log2(1.0 + totals.astype(np.float64)))).astype(np.uint64)
    return offsets.astype(np.uint64) << np.uint64(16) | lengths.astype(np.uint64) << np.uint64(8) | counts


def _write_zeros(path: Path, size: int) -> None:
    """Claim the disk space now: a full disk is an error here, and a signal inside a mapped file."""
    zeros = bytes(_CHUNK_BYTES)
    with path.open("wb") as file:
        for start in range(0, size, _CHUNK_BYTES):
            file.write(zeros[: min(_CHUNK_BYTES, size - start)])


def _copy(source: Path, target: object) -> None:
    with source.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            target.write(piece)  # type: ignore[attr-defined]
