"""A model split over ranks: rank 0 decides, the others run their part of every pass. Each pass is plain torch."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.attention import PlannedAttention, TreeAttention
from verifier.backend import Loaded
from verifier.model import Pass
from verifier.parallel.ranks import Ranks
from verifier.parallel.wire import Told
from verifier.plan import StepPlan
from verifier.step import PackedStep
from verifier.torch.backend import TorchBackend
from verifier.tree import DraftTrees
from verifier.weights import SharedWeights

Int64 = NDArray[np.int64]


class LeadBackend(TorchBackend):
    """Rank 0. Owns the other ranks."""

    name = "parallel"

    def __init__(self, loaded: Loaded, attention: TreeAttention, ranks: Ranks) -> None:
        super().__init__(loaded, attention)
        self._ranks = ranks
        self._told = Told(StepPlan(), DraftTrees.allocate(1), 0)  # the step under way
        self._end_ranks = weakref.finalize(self, ranks.close)

    @property
    def shared_weights(self) -> SharedWeights:
        """See Backend."""
        self._ranks.show_weights()
        return super().shared_weights

    def close(self) -> None:
        """See Backend."""
        self._end_ranks()

    def _begin(self, plan: StepPlan, trees: DraftTrees, hidden_tail: int) -> PackedStep:
        self._ranks.note_pages(plan.pages)
        self._told = Told(plan, trees, hidden_tail)
        return super()._begin(plan, trees, hidden_tail)

    def _forward(self, step: PackedStep, planned: PlannedAttention) -> Pass:
        with self._ranks.leading(self._told):
            return super()._forward(step, planned)

    def _move_slots(self, sources: Int64, targets: Int64) -> None:
        self._ranks.move(sources, targets)
        super()._move_slots(sources, targets)


class RankBackend(TorchBackend):
    """Another rank: it runs what it is told and samples nothing."""

    name = "rank"

    @torch.inference_mode()
    def follow(self, told: Told) -> None:
        """Run this rank's part of a pass of rank 0."""
        step = self._begin(told.plan, told.trees, told.hidden_tail)
        self._forward(step, self._attention.plan(step))

    @torch.inference_mode()
    def follow_move(self, sources: Int64, targets: Int64) -> None:
        """Move what rank 0 accepted from slots [m] to slots [m]."""
        self._move_slots(np.array(sources), np.array(targets))  # what came over the wire cannot be written to
