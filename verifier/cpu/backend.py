"""The back end of a CPU: attention, products and what lies between them in C++, the walk in compiled Python."""

from __future__ import annotations

import torch

from verifier.backend import Loaded
from verifier.cpu.accept import HostWalker
from verifier.cpu.attention import NativeAttention
from verifier.cpu.fused import quicken, release, widen
from verifier.torch.accept import TorchWalker
from verifier.torch.backend import TorchBackend


class CpuBackend(TorchBackend):
    """Runs the same steps by code of ours, wherever that gives the same numbers."""

    name = "cpu"

    def __init__(self, loaded: Loaded, *, is_quick: bool) -> None:
        """`is_quick` lets the network's modules run compiled code of ours: else only attention does."""
        super().__init__(loaded, NativeAttention())
        if is_quick:
            self.is_row_invariant = quicken(loaded.network)
            release(loaded.network)
        self.use_compiled(True)

    def _widen(self, logits: torch.Tensor) -> torch.Tensor:
        return widen(logits)

    def use_compiled(self, is_on: bool) -> None:
        """Walk with compiled Python from the next step on, or with torch, which chooses the same tokens."""
        self._walker = HostWalker(self._rows) if is_on else TorchWalker(self._rows)
