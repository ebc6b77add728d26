"""What runs steps: one object per device. Nothing above it asks which one it is.

A step is: apply the plan's changes, pack, one forward pass, choose along the trees, move accepted K/V. A back end knows
nothing about requests, text or clients. Invariant after a step: the K/V of every row are right for all its tokens but
the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from verifier.kv import KVPool
from verifier.model import Target
from verifier.options import VerifierGeometry
from verifier.plan import NOTHING, StepPlan, Wanted
from verifier.rows import SamplingRows
from verifier.step import PackedStep, StepBuffers
from verifier.tree import DraftTrees
from verifier.verdict import Verdict
from verifier.weights import SharedWeights, shared_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model that lies on its device, with its K/V memory attached to its attention modules."""

    network: torch.nn.Module
    attention_names: tuple[str, ...]
    """Names of the attention modules, in layer order."""
    pool: KVPool
    geometry: VerifierGeometry


class Backend(ABC):
    """Runs the steps of one model. Owns its weights, the K/V pool, the static inputs and the sampling state."""

    name: str
    """What a server tells runs."""
    is_row_invariant = False
    """Whether a row's numbers do not depend on what else is in the step, bit for bit."""
    step_sizes: tuple[int, ...] = ()
    """Positions that steps are padded to, ascending; a larger step is not, nor is any where there are none."""
    is_compiled = False
    """Whether the network's layers were compiled for the device."""

    def __init__(self, loaded: Loaded, inputs_device: str) -> None:
        """`inputs_device` is where a step is packed."""
        self.geometry = geometry = loaded.geometry
        self._network = loaded.network
        self._target = Target(loaded.network)
        self._pool = loaded.pool
        self._rows = SamplingRows(geometry.max_rows, geometry.vocab_size)
        self._buffers = StepBuffers(
            geometry.max_rows, geometry.max_positions, geometry.max_model_len, geometry.page_size, inputs_device
        )

    @abstractmethod
    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted = NOTHING) -> Verdict:
        """Run one step.

        Args: `trees` holds tree i of plan.trees[i]; `wanted` is what to tell beside the tokens. Returns: what each row
        won (see Verdict).
        """

    @property
    def num_recorded(self) -> int:
        """How many step sizes are recorded: what steps cost changes with them."""
        return 0

    def use_compiled(self, is_on: bool) -> None:
        """Run compiled Python from the next step on, or what needs none and says the same: until it is on disk."""

    def prepare_first(self) -> None:
        """Make quick what readiness waits for."""

    def warm(self, *, is_idle: bool) -> bool:
        """Make later steps quicker, for a moment, between steps. Returns: whether to call again when idle.

        As after a step, hidden states told before are not valid any more.
        """
        return False

    @property
    def shared_weights(self) -> SharedWeights:
        """The target's own embeddings, for a drafter that reads them. Raises: ModelError if it has none to show."""
        return shared_weights(self._network, self.geometry.vocab_size)

    def close(self) -> None:
        """End what else runs for this back end; nothing can be run afterwards."""

    def _begin(self, plan: StepPlan, trees: DraftTrees, hidden_tail: int) -> PackedStep:
        """Apply a plan's changes and pack its step."""
        for start in plan.starts:
            self._rows.start(start)
        self._buffers.write_pages(plan.pages)
        return self._buffers.pack(plan, trees, hidden_tail)
