"""The K/V memory: pages of slots, one pool for all rows.

Owns the tensors and nothing else; which page belongs to whom is the scheduler's book. A slot is
page * page_size + offset. Page 0 is trash: padding reads it, no sequence ever owns it, so it stays finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from verifier.probe import LayerGeometry

Mover = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]
"""Moves slots within one tensor [layers, slots, heads, dim]: see move_slots and verifier.cuda.kernels.move."""


def move_slots(tensor: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, num_groups: int) -> None:
    """Copy slots `sources` to slots `targets` (both [m] int64) in all layers; any overlap is safe, in any grouping."""
    tensor.index_copy_(1, targets, tensor.index_select(1, sources))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros; on a CPU a page of memory that nobody has used yet takes none."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class KVPool:
    """K and V of every layer. Owns one pair of tensors per kind of layer.

    Layers with equal geometry share one tensor [layers, slots, kv_heads, dim], so that moving accepted nodes is one
    gather and one scatter, not one per layer.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        mover: Mover = move_slots,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._mover = mover
        kinds: dict[tuple[int, int, int], list[int]] = {}
        for index, layer in enumerate(layers):
            kinds.setdefault((layer.num_kv_heads, layer.k_dim, layer.v_dim), []).append(index)
        num_slots = num_pages * page_size
        self._tensors: list[torch.Tensor] = []
        self._k: dict[int, torch.Tensor] = {}
        self._v: dict[int, torch.Tensor] = {}
        for (heads, k_dim, v_dim), members in kinds.items():
            k, v = (_zeros((len(members), num_slots, heads, dim), dtype, device) for dim in (k_dim, v_dim))
            self._tensors += [k, v]
            for place, index in enumerate(members):
                self._k[index], self._v[index] = k[place], v[place]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K [slots, kv_heads, k_dim] and V [slots, kv_heads, v_dim] of layer `index`."""
        return self._k[index], self._v[index]

    def move(self, sources: torch.Tensor, targets: torch.Tensor, num_groups: int = 1) -> None:
        """Copy slots `sources` to slots `targets` (both [m] int64) in all layers.

        The moves come in `num_groups` groups of equal size, one for each row: accepted nodes, root first. Overlaps
        within a row are safe.
        """
        for tensor in self._tensors:
            self._mover(tensor, sources, targets, num_groups)
