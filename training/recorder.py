"""Records the target's hidden states of answers while another drafter makes the guesses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drafters.base import Drafter, Int32, News, RowContext
from verifier.tree import DraftTrees

Float16 = NDArray[np.float16]

_LARGEST = 65504.0
"""Largest finite number of float16."""


@dataclass(slots=True)
class _Run:
    """States at consecutive positions: `num_states` from position `first` on. Owns the pieces."""

    first: int
    pieces: list[Float16]
    num_states: int

    def cut(self, stop: int) -> None:
        """Forget the states at position `stop` and behind it."""
        surplus = self.first + self.num_states - stop
        while surplus > 0:
            last = self.pieces.pop()
            if last.shape[0] > surplus:
                self.pieces.append(last[: last.shape[0] - surplus])
            self.num_states -= min(surplus, last.shape[0])
            surplus -= last.shape[0]


class RecordingDrafter(Drafter):
    """Passes everything on to the drafter it wraps, and keeps the hidden states on the way.

    Owns, by sampling seed (the caller gives each answer its own), the last run of states at consecutive positions. A
    gap, where a prefix cache or a failed step left states out, starts a new run; a preempted answer goes on with its
    old one.
    """

    wants_hidden = True

    def __init__(self, inner: Drafter, window: int) -> None:
        self._inner = inner
        self._seeds: dict[int, int] = {}  # of each live row
        self._runs: dict[int, _Run] = {}
        self.num_candidates = inner.num_candidates
        self.max_depth = inner.max_depth
        self.hidden_window = window

    def start(self, row: int, context: RowContext) -> None:
        """A new answer, or one that was preempted."""
        self._seeds[row] = context.seed
        self._inner.start(row, context)

    def read(self, news: News) -> None:
        """Keep the states, as float16 on the host."""
        if news.rows.size:
            self._inner.read(news)
        hidden = news.hidden
        if hidden is None:
            return
        states: Float16 = hidden.states.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
        starts = hidden.starts.tolist()
        for index, (row, first) in enumerate(zip(hidden.rows.tolist(), hidden.first.tolist(), strict=True)):
            self._append(self._seeds[row], first, states[starts[index] : starts[index + 1]])

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """The trees of the wrapped drafter."""
        self._inner.propose(rows, max_nodes, out)

    def stop(self, row: int) -> None:
        """The row is free; its states stay until they are taken."""
        self._seeds.pop(row, None)
        self._inner.stop(row)

    def take(self, seed: int) -> tuple[int, Float16] | None:
        """The states of the answer with this seed, and forget them: position of the first, states [S, H]."""
        run = self._runs.pop(seed, None)
        return None if run is None or not run.num_states else (run.first, np.concatenate(run.pieces))

    def _append(self, seed: int, first: int, states: Float16) -> None:
        run = self._runs.get(seed)
        if run is None or not run.first <= first <= run.first + run.num_states:
            self._runs[seed] = _Run(first, [states], states.shape[0])
            return
        run.cut(first)
        run.pieces.append(states)
        run.num_states += states.shape[0]
