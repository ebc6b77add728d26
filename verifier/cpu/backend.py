"""The back end of a CPU: attention, products and what lies between them in C++, the walk in compiled Python."""

from __future__ import annotations

import torch

from verifier.backend import Loaded
from verifier.cpu.accept import HostWalker
from verifier.cpu.attention import NativeAttention
from verifier.cpu.decoder import join_layers
from verifier.cpu.fused import quicken, release, widen
from verifier.cpu.threads import leave_torch_one
from verifier.plan import Chunk, StepPlan
from verifier.torch.accept import TorchWalker
from verifier.torch.backend import TorchBackend
from verifier.tree import DraftTrees


class CpuBackend(TorchBackend):
    """Runs the same steps by code of ours, wherever that gives the same numbers."""

    name = "cpu"

    def __init__(self, loaded: Loaded, *, is_quick: bool) -> None:
        """`is_quick` lets the network's modules run compiled code of ours: else only attention does."""
        attention = NativeAttention()
        super().__init__(loaded, attention)
        if is_quick:
            quick = quicken(loaded.network)
            self.is_row_invariant = quick.is_whole(loaded.network)
            num_joined = join_layers(loaded.network, quick, attention, self._try_step)
            release(loaded.network)
            if self.is_row_invariant and num_joined == len(loaded.attention_names):
                leave_torch_one()
        self.use_compiled(True)

    @torch.inference_mode()
    def _try_step(self) -> None:
        """A step whose K/V go to the page that nobody owns, which is where a row without pages writes."""
        plan = StepPlan(chunks=(Chunk(0, 0, (0, 1, 2), False),))
        step = self._buffers.pack(plan, DraftTrees.allocate(1))
        self._forward(step, self._attention.plan(step))

    def _widen(self, logits: torch.Tensor) -> torch.Tensor:
        return widen(logits)

    def use_compiled(self, is_on: bool) -> None:
        """Walk with compiled Python from the next step on, or with torch, which chooses the same tokens."""
        self._walker = HostWalker(self._rows) if is_on else TorchWalker(self._rows)
