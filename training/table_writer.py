"""Writing a corpus table: pruned rows are collected, then the file is put together and moved into place."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drafters.ngram.table import (
    LONG_CONTEXT,
    PROBABILITY_BITS,
    PROBABILITY_UNITS,
    TableInfo,
    capacity_for,
    insert_rows,
    layout,
)

Uint64 = NDArray[np.uint64]
Uint32 = NDArray[np.uint32]
Ngrams = tuple[Uint64, Uint64, Uint64]
"""Context, token and count of n-grams, [n] each: contexts ascending, and all that is known of each."""


class TableWriter:
    """Collects the rows of a table of `top_k` successors a context. Owns them, in memory, until `write`."""

    def __init__(self, vocab_size: int, top_k: int) -> None:
        self._top_k = top_k
        self._entries: list[Uint32] = [np.zeros(0, np.uint32)]
        self._num_entries = 0
        self._contexts: list[tuple[Uint64, Uint64]] = []  # keys in the table, packed rows
        self._num_contexts = {2: 0, 3: 0}  # by length
        self._uni = np.zeros(0, np.uint32)
        self._bi_rows = np.zeros(vocab_size, np.uint64)  # [V]

    def add_unigrams(self, counts: NDArray[np.int64]) -> None:
        """The most frequent tokens, from counts [V]."""
        best = np.argsort(-counts, kind="stable")[: self._top_k]
        best = best[counts[best] > 0]
        self._uni = _pack(best.astype(np.uint64), counts[best] / counts.sum())

    def add_contexts(self, ngrams: Ngrams, length: int, min_count: int) -> None:
        """The successors of contexts of `length` tokens, 1 to 3, that were seen at least `min_count` times."""
        kept, rows = self._add_rows(ngrams, min_count)
        if length == 1:
            self._bi_rows[kept.astype(np.int64)] = rows
            return
        keys = kept + np.uint64(1) if length == 2 else kept | np.uint64(LONG_CONTEXT)  # 0 is an empty slot
        self._contexts.append((keys, rows))
        self._num_contexts[length] += keys.size

    def write(self, out: Path, draft: Path, **facts: str | int) -> TableInfo:
        """Put the file together at `draft` and move it to `out`. Raises OSError when the disk is full.

        `facts`: the fields of TableInfo that the rows do not tell.
        """
        info = TableInfo(
            vocab_size=self._bi_rows.size,
            top_k=self._top_k,
            num_bigrams=int(np.count_nonzero(self._bi_rows)),
            num_contexts=self._num_contexts[2],
            num_long_contexts=self._num_contexts[3],
            num_entries=self._num_entries,
            **facts,  # type: ignore[arg-type]
        )
        slots = np.zeros(2 * capacity_for(sum(self._num_contexts.values())), np.uint64)
        for keys, rows in self._contexts:
            insert_rows(slots, keys, rows)
        entries = np.concatenate(self._entries)
        arrays: dict[str, Uint64 | Uint32] = {
            "tri_slots": slots, "bi_rows": self._bi_rows, "uni": self._uni, "entries": entries
        }  # fmt: skip
        head, spans, size = layout({name: array.size for name, array in arrays.items()}, info)
        with draft.open("wb") as file:
            file.write(head)
            for name, array in arrays.items():
                file.seek(spans[name][0])
                file.write(array.data)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, out)
        return info

    def _add_rows(self, ngrams: Ngrams, min_count: int) -> tuple[Uint64, Uint64]:
        """Prune contexts and keep their entries. Returns: the contexts kept and their packed rows, [c] each."""
        contexts, tokens, counts = ngrams
        starts = np.flatnonzero(np.concatenate(([True], contexts[1:] != contexts[:-1])))
        sizes = np.diff(np.append(starts, contexts.size))
        totals = np.add.reduceat(counts, starts)  # [contexts]
        owner = np.repeat(np.arange(starts.size), sizes)  # [n] which context
        share = counts / totals[owner]
        order = np.lexsort((-share, owner))
        rank = np.arange(contexts.size) - starts[owner]  # rank within the context, once ordered
        is_seen = np.rint(share[order] * PROBABILITY_UNITS) >= 1
        keep = (rank < self._top_k) & is_seen & (totals >= min_count)[owner]
        order, owner = order[keep], owner[keep]
        self._entries.append(_pack(tokens[order], share[order]))
        lengths = np.bincount(owner, minlength=starts.size)
        kept = lengths > 0
        offsets = self._num_entries + np.cumsum(lengths) - lengths
        self._num_entries += int(order.size)
        return contexts[starts][kept], _pack_rows(offsets[kept], lengths[kept], totals[kept])


def _pack(tokens: Uint64, share: NDArray[np.float64]) -> Uint32:
    units = np.maximum(1, np.rint(share * PROBABILITY_UNITS)).astype(np.uint32)
    return tokens.astype(np.uint32) << np.uint32(PROBABILITY_BITS) | units


def _pack_rows(offsets: NDArray[np.int64], lengths: NDArray[np.int64], totals: Uint64) -> Uint64:
    counts = np.minimum(255, np.rint(8.0 * np.log2(1.0 + totals.astype(np.float64)))).astype(np.uint64)
    return offsets.astype(np.uint64) << np.uint64(16) | lengths.astype(np.uint64) << np.uint64(8) | counts
