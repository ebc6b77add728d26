"""The hybrid drafter: one tree from the tri-gram, the CTC head and copied spans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drafters.base import Drafter, Int32, News, RowContext
from drafters.calibration import first_calibration, learn, make_asked, no_losses
from drafters.combine import make_pool, make_spans
from drafters.copy import Texts
from drafters.head.drafter import CtcDrafter
from drafters.head.frames import NO_GUESS, Guess, Model, Scratch, make_scratch
from drafters.ngram.drafter import TrigramDrafter
from drafters.tree_search import Limits, Memory, best_first
from verifier.tree import DraftTrees

_MAX_DEPTH = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridOptions:
    """How the guesses are merged. The defaults were measured: tests/bench/drafters_ablation.py."""

    max_rows: int = 64
    cut: float = 0.5
    """Candidates that would score below cut / max_nodes are not looked for: they would hardly get into the tree."""
    reach: float = 0.9
    """How much the noise counts in the coupled ranking at temperature 1; it falls with the root of the temperature."""
    powers: tuple[float, ...] = (0.25, 1.0, 0.5, 0.85)
    """What tri-gram and CTC estimate are raised to before they are multiplied, at temperature 0: right behind the root,
    where the head has seen all there is, and deeper, where it has not."""
    sampled_powers: tuple[float, ...] = (0.45, 0.78, 0.6, 0.68)
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

    Without a head, and on the light way, it merges tri-gram and copied spans. It works with the tri-gram and CTC
    drafters that serve other rows by their own names, so that what one learns the other knows; what is to be kept, they
    keep. Owns the texts of its rows and the calibration, which counts acceptances and holds no text, so that tenants
    may share it.
    """

    def __init__(self, trigram: TrigramDrafter, ctc: CtcDrafter | None, options: HybridOptions | None = None) -> None:
        options = options or HybridOptions()
        self._trigram, self._ctc = trigram, ctc
        self._texts = Texts(options.max_rows)
        self.max_depth = _MAX_DEPTH
        self.num_candidates = trigram.num_candidates
        self.wants_hidden = self.has_light = ctc is not None
        self.hidden_window = ctc.hidden_window if ctc is not None else 0
        powers: NDArray[np.float64] = np.array([options.powers, options.sampled_powers], np.float64).reshape(2, 2, 2)
        self._memory = Memory(
            calibration=first_calibration(options.max_rows, options.prior, options.worth_prior, options.decays),
            asked=make_asked(options.max_rows),
            limits=Limits(_MAX_DEPTH, float(options.cut), float(options.reach), float(options.floor), powers),
            pool=make_pool(trigram.vocab_size),
            spans=make_spans(),
        )
        self._bare = self._memory.bare()
        nothing: NDArray[np.float32] = np.zeros((1, 0), np.float32)
        self._no_frames: tuple[Model, Scratch] = ((nothing, nothing), np.zeros(6)), make_scratch(1, 1)

    def start(self, row: int, context: RowContext) -> None:
        """Tell every part."""
        self._trigram.start(row, context)
        self._texts.start(row, context)
        if self._ctc is not None:
            self._ctc.start(row, context)
        if row >= self._memory.asked.sizes.size:
            self._grow(2 * row + 1)
        self._memory.asked.sizes[row] = 0
        self._memory.calibration.losses[row] = 0.0

    def _grow(self, rows: int) -> None:
        """Room for more rows. What was asked is lost, which costs a few observations."""
        calibration = self._memory.calibration._replace(losses=no_losses(rows))
        self._memory = self._memory._replace(calibration=calibration, asked=make_asked(rows))
        self._bare = self._memory.bare()

    def read(self, news: News) -> None:
        """Learn how far the last trees were right; the parts learn what they can."""
        calibration, asked, *_ = self._bare
        learn(news.rows, news.starts, news.tokens, calibration, asked)
        self._texts.extend(news)
        self._trigram.read(news)
        if self._ctc is not None:
            self._ctc.read(news)

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row."""
        if self._ctc is None:
            self.propose_light(rows, max_nodes, out)
            return
        guess, is_known = self._ctc.guess(rows[max_nodes > 1])
        self._merge((rows, max_nodes, guess, is_known), self._ctc.searched(), out)

    def propose_light(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row, without the head."""
        is_known = np.zeros(rows.size, np.bool_)
        self._merge((rows, max_nodes, NO_GUESS, is_known), self._no_frames, out)

    def _merge(
        self, batch: tuple[Int32, Int32, Guess, NDArray[np.bool_]], frames: tuple[Model, Scratch], out: DraftTrees
    ) -> None:
        packed = (out.tokens, out.parents, out.depths, out.ancestors, out.scores, out.sources, out.row_starts)
        experts = (self._trigram.searched(), frames, self._texts.state)
        best_first(batch, out.num_rows, experts, self._bare, packed)
        out.num_rows += batch[0].size

    def sizes(self) -> dict[str, int]:
        """The texts of all rows and their index; what belongs to the parts, they tell."""
        return {"texts": self._texts.num_bytes}

    def stop(self, row: int) -> None:
        """Tell every part."""
        self._trigram.stop(row)
        self._texts.stop(row)
        self._memory.asked.sizes[row] = 0
        if self._ctc is not None:
            self._ctc.stop(row)
