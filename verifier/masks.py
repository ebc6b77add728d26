"""Which tokens a step may choose at some of its places: what grammars and token limits come down to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Masks for M of the places at which a step chooses: the tree nodes in packed order, then the last chunks."""

    places: Int64  # [M]
    bits: Int32  # [M, ceil(V / 32)] token v may be chosen if bit v % 32 of word v // 32 is set

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of logits [K, V] in which the tokens that may not be chosen are minus infinity.

        A copy, as log-probabilities and drafters read the model's own numbers.
        """
        import torch

        flags = np.unpackbits(self.bits.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
        places = torch.from_numpy(self.places).to(logits.device)
        is_banned = torch.from_numpy(flags).to(logits.device) == 0
        masked = logits.clone()
        masked[places] = masked[places].masked_fill(is_banned, float("-inf"))
        return masked
