"""The hybrid drafter: one tree from the tri-gram, the CTC head and copied spans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drafters.base import Drafter, Int32, News, RowContext
from drafters.ctc.drafter import CtcDrafter
from drafters.ctc.search import Guess, Model, Scratch, make_scratch
from drafters.merge import NUM_CELLS, best_first, learn, make_asked, make_pool, make_spans
from drafters.rates import first_rates
from drafters.texts import Texts
from drafters.trigram.drafter import TrigramDrafter
from verifier.tree import DraftTrees

_MAX_DEPTH = 24

Guesses = tuple[Guess, NDArray[np.bool_]]
"""What the head says of the rows, and which of them it knows [R]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridOptions:
    """How the guesses are merged. The defaults were measured: tests/bench/drafters_ablation.py."""

    max_rows: int = 64
    cut: float = 0.5
    """Candidates that would score below cut / max_nodes are not looked for: they would hardly get into the tree."""
    reach: float = 0.9
    """How much the noise counts in the coupled ranking at temperature 1; it falls with the root of the temperature."""
    powers: tuple[float, ...] = (0.5, 1.0, 0.5, 0.85)
    """What tri-gram and CTC estimate are raised to before they are multiplied, at temperature 0: right behind the root,
    where the head has seen all there is, and deeper, where it has not."""
    sampled_powers: tuple[float, ...] = (0.5, 0.76, 0.6, 0.68)
    """The same at temperature > 0."""
    floor: float = 1e-3
    """What an estimate is taken to give to a token that it does not list."""
    prior: float = 4.0
    """How many observations the first estimate of a span's survival is worth."""
    worth_prior: float = 8.0
    """How many expected acceptances it takes to move the calibration of an estimate."""
    decays: tuple[float, float] = (0.998, 0.999)
    """What is left of a calibration cell after one more node: of spans, of estimates."""


class HybridDrafter(Drafter):
    """Proposes trees in which every node is weighed by all that know something of it.

    Without a head it merges tri-gram and copied spans. It works with the tri-gram and CTC drafters that serve other
    rows by their own names, so that what one learns the other knows; what is to be kept, they keep. Owns the texts of
    its rows and the calibration, which counts acceptances and holds no text, so that tenants may share it.
    """

    def __init__(self, trigram: TrigramDrafter, ctc: CtcDrafter | None, options: HybridOptions | None = None) -> None:
        options = options or HybridOptions()
        self._trigram, self._ctc = trigram, ctc
        self._texts = Texts(options.max_rows)
        self.max_depth = _MAX_DEPTH
        self.num_candidates = trigram.num_candidates
        self.wants_hidden = ctc is not None
        self.hidden_window = ctc.hidden_window if ctc is not None else 0
        self._rates = first_rates(options.prior)
        self._worth = np.full((NUM_CELLS, 2), options.worth_prior)
        self._asked = make_asked(options.max_rows)
        self._trust = np.zeros((options.max_rows, 2))
        self._pool = make_pool(trigram.vocab_size)
        self._spans, self._count = make_spans(), np.zeros(1, np.int64)
        self._decays = np.array(options.decays)
        nothing = np.zeros((1, 0), np.float32)
        self._no_frames: tuple[Model, Scratch] = ((nothing, nothing), np.zeros(6)), make_scratch(1, 1)
        self._limits = np.array(
            [_MAX_DEPTH, options.cut, options.reach, options.floor, *options.powers, *options.sampled_powers],
            np.float64,
        )

    def start(self, row: int, context: RowContext) -> None:
        """Tell every part."""
        self._trigram.start(row, context)
        self._texts.start(row, context)
        if self._ctc is not None:
            self._ctc.start(row, context)
        if row >= self._asked[5].size:
            self._asked = make_asked(2 * row + 1)  # what was asked is lost, which costs a few observations
            self._trust = np.zeros((2 * row + 1, 2))
        self._asked[5][row] = 0
        self._trust[row] = 0.0

    def read(self, news: News) -> None:
        """Learn how far the last trees were right; the parts learn what they can."""
        learn(news.rows, news.starts, news.tokens, self._asked, self._rates, self._worth, self._trust, self._decays)
        self._texts.extend(news)
        self._trigram.read(news)
        if self._ctc is not None:
            self._ctc.read(news)

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row."""
        packed = (out.tokens, out.parents, out.depths, out.ancestors, out.scores, out.sources, out.row_starts)
        copied = (self._texts.state, self._spans, self._rates, self._count)
        guesses, searched = self._guess(rows)
        experts = (self._trigram.searched(), searched, copied)
        learned = (self._worth, self._trust, self._asked, self._pool)
        best_first(rows, max_nodes, out.num_rows, guesses, experts, learned, self._limits, packed)
        out.num_rows += rows.size

    def _guess(self, rows: Int32) -> tuple[Guesses, tuple[Model, Scratch]]:
        """The head's frames, and what the search reads beside them; stand-ins where there is no head."""
        if self._ctc is None:
            nothing = np.zeros((1, 0), np.int64), np.zeros((rows.size, 1, 1), np.float32)
            return (nothing, np.zeros(rows.size, np.bool_)), self._no_frames
        return self._ctc.guess(rows), self._ctc.searched()

    def stop(self, row: int) -> None:
        """Tell every part."""
        self._trigram.stop(row)
        self._texts.stop(row)
        self._asked[5][row] = 0
        if self._ctc is not None:
            self._ctc.stop(row)
