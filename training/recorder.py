"""Keeps the target's hidden states while it writes answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from drafters.base import Drafter, Int32, News, RowContext
from verifier.tree import DraftTrees

Float16 = NDArray[np.float16]

_LARGEST = 65504.0
"""Largest finite number of float16."""


class StateRecorder(Drafter):
    """A drafter that guesses nothing and is told everything.

    Owns the hidden states of each answer, by its sampling seed (the caller gives each answer its own), in pieces as
    they came, and the last token of each row.
    """

    wants_hidden = True
    max_depth = 0

    def __init__(self, window: int) -> None:
        """`window`: how many states at the end of a prompt are kept."""
        self.hidden_window = window
        self._seeds: dict[int, int] = {}  # of each live row
        self._last: dict[int, int] = {}
        self._pieces: dict[int, list[tuple[int, Float16]]] = {}  # position of the first state, states [n, H]

    def start(self, row: int, context: RowContext) -> None:
        """A new answer, or one that was preempted."""
        self._seeds[row], self._last[row] = context.seed, context.tokens[-1]

    def update(self, news: News) -> None:
        """Keep the states, as float16 on the host."""
        for index, row in enumerate(news.rows.tolist()):
            self._last[row] = int(news.tokens[news.starts[index + 1] - 1])
        hidden = news.hidden
        if hidden is None:
            return
        states: Float16 = hidden.states.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
        starts = hidden.starts.tolist()
        for index, (row, first) in enumerate(zip(hidden.rows.tolist(), hidden.first.tolist(), strict=True)):
            # A copy: a part of the step's array would keep all of it in memory.
            piece = states[starts[index] : starts[index + 1]].copy()
            self._pieces.setdefault(self._seeds[row], []).append((first, piece))

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """Bare roots."""
        for row in rows.tolist():
            out.append_root(self._last[row])

    def stop(self, row: int) -> None:
        """The row is free; its states stay until they are taken."""
        self._seeds.pop(row, None)
        self._last.pop(row, None)

    def take(self, seed: int) -> tuple[int, Float16] | None:
        """The last states [S, H] of an answer at consecutive positions, with the first of these; and forget them.

        A gap, where a prefix cache or a failed step left states out, starts anew; an answer that was preempted goes on
        with its old states.
        """
        pieces = self._pieces.pop(seed, [])
        if not pieces:
            return None
        lowest = min(first for first, _ in pieces)
        length = max(first + states.shape[0] for first, states in pieces) - lowest
        found = np.empty((length, pieces[0][1].shape[1]), np.float16)
        begin = end = -1
        for first, states in pieces:
            begin = begin if begin <= first <= end else first
            end = first + states.shape[0]
            found[first - lowest : end - lowest] = states
        return begin, found[begin - lowest : end - lowest]
