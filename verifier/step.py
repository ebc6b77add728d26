"""One step, packed: where every position of every row goes.

Trees come first, in the order of the plan, then chunks. Owns the static input arrays, allocated once; on a CPU
the tensors share their memory with the arrays, elsewhere they are copied once per step (see cuda/inputs.py for how
the device's own kernels get them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.plan import StepPlan
from verifier.tree import DraftTrees

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


@dataclass(slots=True)
class PackedStep:
    """The inputs of one forward pass, on the device and (for planning attention) on the host.

    G segments = the plan's trees, then its chunks. Segment g owns packed positions starts[g] .. starts[g + 1] - 1
    of row rows[g], whose first prefix_lens[g] tokens are cached; its own i-th position lies in sequence slot
    prefix_lens[g] + i.
    """

    num_trees: int
    num_positions: int  # N
    rows: Int32  # [G]
    starts: Int32  # [G + 1]
    prefix_lens: Int32  # [G]
    ancestors: Int64  # [N] tree bitsets; unused for chunks, which are causal
    depths: Int32  # [N] place behind the prefix: position = prefix length + depth
    page_table: Int32  # [M, pages per row]
    page_size: int
    input_ids: torch.Tensor  # [1, N] int64
    position_ids: torch.Tensor  # [1, N] int64
    write_slots: torch.Tensor  # [N] int64
    logits_index: torch.Tensor | None  # [K + S + tails] int64, None for all positions
    num_logits: int  # K places where a token is chosen
    num_scored: int  # S places of targets behind them; what the index names then is wanted for its hidden states alone
    chunk_starts: Int32  # [C + 1] where each chunk's tail begins among the places that the index names
    next_positions: Int64  # [K] position of the token that each place with logits is to choose


class StepBuffers:
    """Packs plans into static arrays. Owns the arrays and the page table."""

    def __init__(self, max_rows: int, max_positions: int, max_model_len: int, page_size: int, device: str) -> None:
        self.page_size = page_size
        self.max_positions = max_positions
        self.page_table = np.zeros((max_rows, -(-max_model_len // page_size)), np.int32)
        self._device = device
        self._input_ids = np.zeros(max_positions, np.int64)
        self._position_ids = np.zeros(max_positions, np.int64)
        self._write_slots = np.zeros(max_positions, np.int64)
        # A last position may stand in it twice, and so may one that is scored.
        self._logits_index = np.zeros(2 * max_positions + max_rows, np.int64)
        self._ancestors = np.zeros(max_positions, np.int64)
        self._depths = np.zeros(max_positions, np.int32)
        self._chain = np.arange(max_positions, dtype=np.int32)

    def write_pages(self, pages: tuple[tuple[int, int, int], ...]) -> None:
        """Apply (row, index, page) writes to the page table."""
        for row, index, page in pages:
            self.page_table[row, index] = page

    def pack(self, plan: StepPlan, trees: DraftTrees, hidden_tail: int = 0) -> PackedStep:
        """Lay out one step. `trees` holds the plan's trees in the plan's order; `hidden_tail` as in Wanted."""
        num_trees, num_nodes = len(plan.trees), trees.num_nodes
        assert trees.num_rows == num_trees, f"{trees.num_rows} trees for {num_trees} tree slots"
        segments = [(slot.row, slot.num_cached) for slot in plan.trees] + [(c.row, c.num_cached) for c in plan.chunks]
        places = np.array(segments, np.int32).reshape(-1, 2)
        rows, prefix_lens = np.ascontiguousarray(places[:, 0]), np.ascontiguousarray(places[:, 1])
        starts = np.empty(len(segments) + 1, np.int32)
        starts[: num_trees + 1] = trees.row_starts[: num_trees + 1]
        self._input_ids[:num_nodes] = trees.tokens[:num_nodes]
        self._ancestors[:num_nodes] = trees.ancestors[:num_nodes]
        self._depths[:num_nodes] = trees.depths[:num_nodes]
        num_positions, num_logits = num_nodes, num_nodes
        if plan.chunks:
            self._logits_index[:num_nodes] = self._chain[:num_nodes]
        for index, chunk in enumerate(plan.chunks):
            stop = num_positions + len(chunk.tokens)
            self._input_ids[num_positions:stop] = chunk.tokens
            self._depths[num_positions:stop] = self._chain[: len(chunk.tokens)]
            num_positions = stop
            starts[num_trees + index + 1] = stop
            if chunk.is_last:
                self._logits_index[num_logits] = stop - 1
                num_logits += 1
        assert num_positions <= self.max_positions, f"{num_positions} positions, room for {self.max_positions}"
        num_scored = self._index_targets(plan, starts[num_trees:], num_logits)
        chunk_starts = self._index_tails(starts[num_trees:], num_logits + num_scored, hidden_tail)
        segments_of = np.repeat(self._chain[: rows.size], np.diff(starts))  # [N]
        prefixes = prefix_lens[segments_of]
        slots = prefixes + (self._chain[:num_positions] - starts[segments_of])
        np.add(prefixes, self._depths[:num_positions], out=self._position_ids[:num_positions])
        pages = self.page_table[rows[segments_of], slots // self.page_size].astype(np.int64)
        np.add(pages * self.page_size, slots % self.page_size, out=self._write_slots[:num_positions])
        positions = self._position_ids[:num_positions]
        if plan.chunks:
            positions = positions[self._logits_index[:num_logits]]
        return PackedStep(
            num_trees=num_trees,
            num_positions=num_positions,
            rows=rows,
            starts=starts,
            prefix_lens=prefix_lens,
            ancestors=self._ancestors[:num_positions],
            depths=self._depths[:num_positions],
            page_table=self.page_table,
            page_size=self.page_size,
            input_ids=self._tensor(self._input_ids[:num_positions])[None],
            position_ids=self._tensor(self._position_ids[:num_positions])[None],
            write_slots=self._tensor(self._write_slots[:num_positions]),
            logits_index=self._tensor(self._logits_index[: chunk_starts[-1]]) if plan.chunks else None,
            num_logits=num_logits,
            num_scored=num_scored,
            chunk_starts=chunk_starts,
            next_positions=positions + 1,
        )

    def _index_targets(self, plan: StepPlan, starts: Int32, num_logits: int) -> int:
        """Name the places of all targets behind the places where tokens are chosen; how many there are."""
        end = num_logits
        for start, chunk in zip(starts[:-1].tolist(), plan.chunks, strict=True):
            if chunk.targets:
                count = len(chunk.targets)
                self._logits_index[end : end + count] = self._chain[start : start + count]
                end += count
        return end - num_logits

    def _index_tails(self, starts: Int32, num_before: int, hidden_tail: int) -> Int32:
        """Name the last `hidden_tail` positions of each chunk behind the places with logits; where each tail begins.

        Args: `starts` [C + 1] of the chunks among the packed positions.
        """
        chunk_starts = np.full(starts.size, num_before, np.int32)
        for index, stop in enumerate(starts[1:].tolist() if hidden_tail else ()):
            first = max(int(starts[index]), stop - hidden_tail)
            begin = int(chunk_starts[index])
            self._logits_index[begin : begin + stop - first] = self._chain[first:stop]
            chunk_starts[index + 1] = begin + stop - first
        return chunk_starts

    def _tensor(self, array: Int64) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device == "cpu" else tensor.to(self._device)
