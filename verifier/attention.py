"""The one interface behind which attention back ends differ, and what every layer gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from verifier.model import AttentionInputs
from verifier.probe import LayerGeometry
from verifier.step import PackedStep


@dataclass(frozen=True, slots=True)
class LayerKV:
    """The K/V memory and geometry of one layer; attached to its attention module."""

    k: torch.Tensor  # [slots, kv_heads, k_dim]
    v: torch.Tensor  # [slots, kv_heads, v_dim]
    geometry: LayerGeometry


class PlannedAttention(Protocol):
    """Attention of one step. Writes the step's K/V into the pool, then attends over the row's pages.

    A chunk's position sees its row's prefix and the chunk up to itself. A tree's node sees the prefix and its
    ancestors. Sliding window: key position > query position - window.
    """

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        ...


class TreeAttention(Protocol):
    """A back end. Owns its scratch memory."""

    def plan(self, step: PackedStep) -> PlannedAttention:
        """Everything that is the same for all layers of a step, computed once."""
        ...


def write_kv(inputs: AttentionInputs, layer: LayerKV, step: PackedStep) -> None:
    """Store this layer's new keys and values in their slots."""
    layer.k.index_copy_(0, step.write_slots, inputs.key.squeeze(0).transpose(0, 1))
    layer.v.index_copy_(0, step.write_slots, inputs.value.squeeze(0).transpose(0, 1))
