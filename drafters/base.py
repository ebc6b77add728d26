"""What a drafter is. A wrong guess costs time, never correctness.

The worker tells a drafter what became true and asks for trees; it asks what a drafter *wants*, never who it is. It may
ask twice before it tells: the last trees are verified. Arrays are NumPy, on the host, packed row after row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verifier.tree import DraftTrees

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Uint32 = NDArray[np.uint32]
Uint64 = NDArray[np.uint64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


NOBODY = "\0nobody"
"""Tenant of trial requests: what they teach may not stay. No client's tenant is called so."""


class Source(IntEnum):
    """Which kind of guess a node is; its name labels the metrics."""

    ROOT = 0
    TRIGRAM = 1
    SUFFIX = 2
    CTC = 3
    OTHER = 4
    PREDICTION = 5
    """Copied from the request's `prediction`."""
    GRAMMAR = 6
    """Certain: the request's grammar allows nothing else."""


@dataclass(frozen=True, slots=True)
class RowContext:
    """What a drafter may know of the request that now lives in a row."""

    tenant: str
    """Whose traffic this is: nothing learned from it may help another tenant (promise 4)."""
    tokens: tuple[int, ...]
    """Everything known when the row starts: prompt, and the answer so far after a restart."""
    num_prompt: int
    seed: int
    temperature: float
    stop_ids: tuple[int, ...] = ()
    """Tokens that end this request's answer: nothing is won behind them."""
    prediction: tuple[int, ...] = ()
    """What the client expects the whole answer to be; empty if it said nothing."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The trees that were just verified, with the target's own best tokens at every node of them."""

    trees: DraftTrees
    first: int
    """Tree index of the first of this drafter's trees; tree first + r belongs to News.rows[r]."""
    candidates: Int32  # [N, K] the target's top-K tokens at every packed node of `trees`, best first
    logits: Float32  # [N, K] their raw logits


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The target's final hidden states of a step, for drafters that want them; valid until the next step.

    Row rows[s] has states[starts[s] : starts[s + 1]], which stood at consecutive positions of its text from first[s]
    on; the state at position p predicts the token at p + 1. There may be gaps to earlier steps: a prefix found in the
    cache was not computed, and a step that ran row by row gives none.
    """

    rows: Int32  # [S] also rows whose prompt is not finished
    starts: Int32  # [S + 1]
    first: Int64  # [S]
    states: Any  # [n, H] torch.Tensor on the target's device, in its dtype


@dataclass(frozen=True, slots=True)
class News:
    """What became true in one step, packed row after row. Read-only."""

    rows: Int32  # [R]
    starts: Int32  # [R + 1] offsets into tokens
    tokens: Int64  # [n] accepted tokens and the target's own one, in order
    verified: Verified | None = None
    """Absent where the rows only finished their prompt, or where no drafter asked for candidates."""
    hidden: HiddenStates | None = None
    """If the drafter wants them: of root and accepted nodes, and of the last positions of prompt chunks."""


class Drafter(ABC):
    """Guesses what comes next. Owns its own memory, keyed by row."""

    wants_hidden: bool = False
    """Whether its news shall carry hidden states."""
    hidden_window: int = 0
    """How many last positions of a prompt it wants the states of, if it wants them."""
    num_candidates: int = 0
    """How many of the target's top tokens it wants to see at each verified node (K)."""
    max_depth: int
    """Most tokens below the root that a tree of this drafter can hold."""
    has_cheap: bool = False
    """Whether cheap effort differs from full effort: see `propose_cheap`."""

    def start(self, row: int, context: RowContext) -> None:
        """A request now lives in `row`."""

    @abstractmethod
    def update(self, news: News) -> None:
        """Learn what became true since the last call."""

    @abstractmethod
    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """Append one tree per row to `out`, in order: row rows[r] gets at most max_nodes[r] nodes, root included.

        Node 0 carries the last token read for the row; a bare root is a fine answer. `rows` and `max_nodes` are [R].
        """

    def propose_cheap(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """The same at cheap effort, without what is dear to ask. Called in place of `propose` where that is faster.

        If it `wants_hidden`, most of the news between two such calls carry no states.
        """
        raise NotImplementedError(f"{type(self).__name__} has no cheap way to draft")

    def stop(self, row: int) -> None:
        """The row is free; what it taught may stay with its tenant."""

    def sizes(self) -> dict[str, int]:
        """Bytes of what it holds, by part (table, caches, texts, head ...), for those who watch the server."""
        return {}

    def save(self) -> None:
        """Keep what was learned, where the drafter was told to keep it. Called at a graceful exit."""
