"""The oracle of every attention: one row at a time, gathered, softmax in float32 or float64, nothing clever."""

from __future__ import annotations

import torch

from verifier.attention import LayerKV, PlannedAttention, write_kv
from verifier.cuda.yardstick import softmax_attention
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.step import PackedStep


class ReferenceAttention:
    """Slow and readable; every other back end is compared with it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Computes in `dtype`."""
        self._dtype = dtype

    def plan(self, step: PackedStep) -> PlannedAttention:
        """Nothing is precomputed."""
        return _Planned(step, self._dtype)


class _Planned:
    def __init__(self, step: PackedStep, dtype: torch.dtype) -> None:
        self._step, self._dtype = step, dtype

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        step, layer = self._step, getattr(inputs.module, KV_ATTRIBUTE)
        assert isinstance(layer, LayerKV)
        write_kv(inputs, layer, step)
        out = inputs.query.new_empty((1, step.num_positions, layer.geometry.num_heads, layer.geometry.v_dim))
        for segment in range(step.rows.shape[0]):
            start, stop = int(step.starts[segment]), int(step.starts[segment + 1])
            slots = sequence_slots(step, segment).to(layer.k.device)
            visible = visibility(step, segment, layer.geometry.window).to(layer.k.device)
            query = inputs.query[0, :, start:stop].to(self._dtype)  # [heads, n, k_dim]
            key, value = layer.k[slots].to(self._dtype), layer.v[slots].to(self._dtype)
            out[0, start:stop] = softmax_attention(query, key, value, visible, layer.geometry, inputs.sinks).to(
                out.dtype
            )
        return out


def sequence_slots(step: PackedStep, segment: int) -> torch.Tensor:
    """Slots of a segment's prefix and own positions, in sequence order: [prefix + n] int64."""
    length = int(step.prefix_lens[segment] + step.starts[segment + 1] - step.starts[segment])
    places = torch.arange(length)
    pages = torch.from_numpy(step.page_table[step.rows[segment]]).long()
    return pages[places // step.page_size] * step.page_size + places % step.page_size


def visibility(step: PackedStep, segment: int, window: int | None) -> torch.Tensor:
    """What each of a segment's n positions may see: [n, prefix + n] bool."""
    start, stop, prefix = int(step.starts[segment]), int(step.starts[segment + 1]), int(step.prefix_lens[segment])
    num = stop - start
    depths = torch.from_numpy(step.depths[start:stop].copy()).long()  # [n]
    own = torch.ones((num, num), dtype=torch.bool).tril()
    if segment < step.num_trees:
        bits = torch.from_numpy(step.ancestors[start:stop].copy())  # [n]
        own = (bits[:, None] >> torch.arange(num)[None]) & 1 == 1
    visible = torch.cat([torch.ones((num, prefix), dtype=torch.bool), own], dim=1)
    if window is not None:
        query_positions = prefix + depths
        key_positions = torch.cat([torch.arange(prefix), prefix + depths])
        visible &= key_positions[None] > query_positions[:, None] - window
    return visible
