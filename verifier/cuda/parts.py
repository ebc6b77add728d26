"""What steps on a device are made of, and what runs them: the seam between the verifier and verifier.cuda.path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks
from verifier.attention import PlannedAttention
from verifier.cuda.graphs import Graphs
from verifier.cuda.recorder import Recorder
from verifier.kv import KVPool
from verifier.model import Attender, Pass
from verifier.plan import Wanted
from verifier.rows import SamplingRows
from verifier.step import PackedStep, StepBuffers
from verifier.verdict import Verdict


class Network(Protocol):
    """The target model, as it is or compiled: see verifier.model.Target."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        step: Attender,
        logits_index: torch.Tensor | None = None,
        kept: int | torch.Tensor | None = None,
    ) -> Pass:
        """Logits and states of one pass."""
        ...


class SizedAttention(Protocol):
    """A back end whose arrays lie where a recording finds them: see verifier.cuda.attention."""

    def plan(self, step: PackedStep, size: tuple[int, int] | None = None) -> PlannedAttention:
        """Bring a step's arrays to the device; `size` names a larger class than the step's own."""
        ...

    def plan_nothing(self, size: tuple[int, int], buffers: StepBuffers, write_slots: torch.Tensor) -> PlannedAttention:
        """Attention over a class of steps, to be recorded."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceParts:
    """What a step is run with; all of it belongs to the verifier."""

    pool: KVPool
    rows: SamplingRows
    buffers: StepBuffers
    network: Network
    forward: Callable[[PackedStep, PlannedAttention], Pass]
    """The pass of a step that is not recorded."""
    move: Callable[[NDArray[np.int32], Path, PackedStep], None]
    """Moves the K/V of what the host has walked."""
    recorder: Recorder | None
    device: torch.device
    vocab_size: int


class DeviceSteps(Protocol):
    """Runs steps that lie packed on the host."""

    @property
    def graphs(self) -> Graphs | None:
        """The recordings; None if there can be none."""
        ...

    def run(self, step: PackedStep, walks: Walks, wanted: Wanted) -> Verdict:
        """Run one step."""
        ...
