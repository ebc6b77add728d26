"""Attention by torch's scaled_dot_product_attention over gathered pages: any CPU, any GPU, no kernel of ours.

Segments of similar size form a group, trees and chunks apart. A group is padded to one rectangle; its
gather indices and its mask are made once per step and serve all layers. Query heads that share a K/V head are folded
into the query axis, so K and V are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.attention import LayerKV, write_kv
from verifier.jit import jit
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.step import PackedStep

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_NO_WINDOW = 2**31 - 1
_FREE_QUERIES, _FREE_KEYS = 64, 4096
"""Padding that costs less than one more call would."""


class SdpaAttention:
    """Groups, gathers, and lets torch attend."""

    def plan(self, step: PackedStep) -> PlannedSdpa:
        """Group the step's segments and lay out their gather indices."""
        return PlannedSdpa(step, [Group.make(step, members) for members in _group_segments(step)])


def _group_segments(step: PackedStep) -> list[list[int]]:
    """Segments that are padded together, as lists of segment numbers in packed order; trees and chunks apart."""
    sizes = np.diff(step.starts)
    lengths = step.prefix_lens + sizes
    num_segments = step.rows.shape[0]
    groups: list[list[int]] = []
    for first, stop in ((0, step.num_trees), (step.num_trees, num_segments)):
        if first < stop:
            groups += _split_by_waste(first, sizes[first:stop], lengths[first:stop])
    return groups


def _split_by_waste(first: int, sizes: Int32, lengths: Int32) -> list[list[int]]:
    """Groups whose rectangle is at most about twice what is in it; one long row must not widen all the short ones.

    `sizes` are queries and `lengths` keys of the segments first, first + 1, ...
    """

    def is_fitting(count: int, most: tuple[int, int], total: tuple[int, int]) -> bool:
        return count * most[0] <= 2 * total[0] + _FREE_QUERIES and count * most[1] <= 2 * total[1] + _FREE_KEYS

    count = sizes.shape[0]
    most, total = (int(sizes.max()), int(lengths.max())), (int(sizes.sum()), int(lengths.sum()))
    if is_fitting(count, most, total):
        return [list(range(first, first + count))]
    groups: list[list[int]] = []
    most = total = (0, 0)
    for segment in np.argsort(-lengths, kind="stable").tolist():
        size, length = int(sizes[segment]), int(lengths[segment])
        wider = (max(most[0], size), max(most[1], length))
        fuller = (total[0] + size, total[1] + length)
        if not groups or not is_fitting(len(groups[-1]) + 1, wider, fuller):
            groups.append([])
            wider, fuller = (size, length), (size, length)
        groups[-1].append(first + segment)
        most, total = wider, fuller
    return [sorted(group) for group in groups]


@jit()
def _fill_indices(
    sizes: tuple[int, int],
    starts: Int32,
    stops: Int32,
    prefixes: Int32,
    pages: tuple[Int32, int],
    out: tuple[Int64, Int64, Int64],
) -> None:
    """Packed index of every padded query, its inverse, and the slot of every padded key (0, the trash page, beyond)."""
    max_queries, max_keys = sizes
    table, page_size = pages
    query_index, padded_index, key_slots = out
    done = 0
    for member in range(starts.shape[0]):
        num = stops[member] - starts[member]
        for place in range(max_queries):
            query_index[member * max_queries + place] = starts[member] + min(place, num - 1)
        for place in range(num):
            padded_index[done] = member * max_queries + place
            done += 1
        for place in range(max_keys):
            slot = np.int64(0)
            if place < prefixes[member] + num:
                slot = np.int64(table[member, place // page_size]) * page_size + place % page_size
            key_slots[member * max_keys + place] = slot


@jit()
def _fill_mask(
    mask: Float32, segments: tuple[Int32, Int32, Int32], nodes: tuple[Int64, Int32], is_tree: bool, window: int
) -> None:
    """Additive mask [members, queries, keys]: 0 where visible, minus infinity elsewhere. Padded queries see key 0."""
    starts, stops, prefixes = segments
    ancestors, depths = nodes
    mask[:] = -np.inf
    for member in range(starts.shape[0]):
        start, prefix = starts[member], prefixes[member]
        num = stops[member] - start
        for query in range(num, mask.shape[1]):
            mask[member, query, 0] = 0.0
        for query in range(num):
            depth = depths[start + query]
            first = max(0, prefix + depth - window + 1)
            for key in range(min(first, prefix), prefix):
                if key >= first:
                    mask[member, query, key] = 0.0
            bits = ancestors[start + query]
            for key in range(query + 1):
                sees = ((bits >> key) & 1) == 1 if is_tree else True
                if sees and prefix + depths[start + key] >= first:
                    mask[member, query, prefix + key] = 0.0


@dataclass(slots=True)
class Group:
    """Segments attended as one padded rectangle [members, queries] x keys. Owns its masks, made on first use."""

    step: PackedStep
    is_tree: bool
    starts: Int32  # [members]
    stops: Int32  # [members]
    prefixes: Int32  # [members]
    num_queries: int
    num_keys: int
    is_dense: bool
    """Every member has num_queries queries: a view of the packed positions, no index needed."""
    query_index: torch.Tensor  # [members * queries] packed index
    padded_index: torch.Tensor  # [real queries] place in the padded rectangle
    key_slots: torch.Tensor | None  # [members * keys]; None when the keys lie in one run of slots
    first_slot: int
    masks: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, step: PackedStep, members: Sequence[int]) -> Group:
        """Lay out the segments `members`, in packed order."""
        chosen = np.asarray(members, np.int32)
        starts, stops, prefixes = step.starts[chosen], step.starts[chosen + 1], step.prefix_lens[chosen]
        counts = stops - starts
        num_queries, num_keys = int(counts.max()), int((prefixes + counts).max())
        num_pages = -(-num_keys // step.page_size)
        table = np.ascontiguousarray(step.page_table[step.rows[chosen], :num_pages])
        query_index = np.empty(len(members) * num_queries, np.int64)
        padded_index = np.empty(int(counts.sum()), np.int64)
        key_slots = np.empty(len(members) * num_keys, np.int64)
        sizes = (num_queries, num_keys)
        out = (query_index, padded_index, key_slots)
        _fill_indices(sizes, starts, stops, prefixes, (table, step.page_size), out)
        is_run = len(members) == 1 and bool((table[0] == table[0, 0] + np.arange(num_pages)).all())
        device = step.input_ids.device
        return cls(
            step=step,
            is_tree=members[0] < step.num_trees,
            starts=starts,
            stops=stops,
            prefixes=prefixes,
            num_queries=num_queries,
            num_keys=num_keys,
            is_dense=bool((counts == num_queries).all()),
            query_index=torch.from_numpy(query_index).to(device),
            padded_index=torch.from_numpy(padded_index).to(device),
            key_slots=None if is_run else torch.from_numpy(key_slots).to(device),
            first_slot=int(key_slots[0]),
        )

    def mask(self, window: int | None, fold: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask [members, 1, fold * queries, keys] for `fold` query heads per K/V head.

        None when every key is visible: one row that decodes one token, within its window.
        """
        if self.num_queries == 1 and self.starts.shape[0] == 1 and (window is None or window >= self.num_keys):
            return None
        key = (_NO_WINDOW if window is None else window, fold, dtype)
        if key not in self.masks:
            array = np.empty((self.starts.shape[0], self.num_queries, self.num_keys), np.float32)
            segments = (self.starts, self.stops, self.prefixes)
            _fill_mask(array, segments, (self.step.ancestors, self.step.depths), self.is_tree, key[0])
            mask = torch.from_numpy(array).to(self.step.input_ids.device, dtype)
            self.masks[key] = mask.repeat(1, fold, 1)[:, None]
        return self.masks[key]

    def gather(self, pool: torch.Tensor) -> torch.Tensor:
        """This group's keys or values, [members, kv_heads, keys, dim], from a layer's pool [slots, kv_heads, dim]."""
        if self.key_slots is None:
            return pool.narrow(0, self.first_slot, self.num_keys).transpose(0, 1).unsqueeze(0)
        rows = pool.index_select(0, self.key_slots)
        return rows.view(self.starts.shape[0], self.num_keys, pool.shape[1], pool.shape[2]).transpose(1, 2)


class PlannedSdpa:
    """Attention of one step over its groups."""

    def __init__(self, step: PackedStep, groups: list[Group]) -> None:
        self._step = step
        self.groups = groups

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        layer: LayerKV = getattr(inputs.module, KV_ATTRIBUTE)
        write_kv(inputs, layer, self._step)
        packed = inputs.query.squeeze(0).transpose(0, 1)  # [N, heads, k_dim]
        if len(self.groups) == 1 and self.groups[0].is_dense:
            return self._attend_group(self.groups[0], packed, layer, inputs.sinks).unsqueeze(0)
        out = packed.new_empty((packed.shape[0], layer.geometry.num_heads, layer.geometry.v_dim))
        for group in self.groups:
            result = self._attend_group(group, packed, layer, inputs.sinks)
            if not group.is_dense:
                result = result.index_select(0, group.padded_index)
            first, last = int(group.starts[0]), int(group.stops[-1])
            if last - first == result.shape[0]:
                out[first:last] = result
            else:
                out.index_copy_(0, group.query_index.index_select(0, group.padded_index), result)
        return out[None]

    def _attend_group(
        self, group: Group, packed: torch.Tensor, layer: LayerKV, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns: [members * queries, heads, v_dim]."""
        geometry, members = layer.geometry, group.starts.shape[0]
        fold = geometry.num_heads // geometry.num_kv_heads
        first, last = int(group.starts[0]), int(group.stops[-1])
        if group.is_dense and last - first == members * group.num_queries:
            query = packed.narrow(0, first, last - first)
        else:
            query = packed.index_select(0, group.query_index)
        # [members, kv_heads, fold * queries, k_dim]
        if group.num_queries == 1:
            query = query.view(members, geometry.num_kv_heads, fold, geometry.k_dim)
        else:
            query = query.view(members, group.num_queries, geometry.num_kv_heads, fold, geometry.k_dim)
            query = query.permute(0, 2, 3, 1, 4).reshape(members, geometry.num_kv_heads, -1, geometry.k_dim)
        key, value = group.gather(layer.k), group.gather(layer.v)
        mask = group.mask(geometry.window, fold, query.dtype)
        if geometry.softcap is None and sinks is None:
            result = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=geometry.scaling
            )
        else:
            result = _explicit_attention(query, key, value, mask, layer, sinks)
        if group.num_queries == 1:
            return result.reshape(members, geometry.num_heads, geometry.v_dim)
        result = result.view(members, geometry.num_kv_heads, fold, group.num_queries, geometry.v_dim)
        return result.permute(0, 3, 1, 2, 4).reshape(-1, geometry.num_heads, geometry.v_dim)


def _explicit_attention(
    query: torch.Tensor,  # [members, kv_heads, fold * queries, k_dim]
    key: torch.Tensor,  # [members, kv_heads, keys, k_dim]
    value: torch.Tensor,  # [members, kv_heads, keys, v_dim]
    mask: torch.Tensor | None,  # [members, 1, fold * queries, keys]
    layer: LayerKV,
    sinks: torch.Tensor | None,  # [heads]
) -> torch.Tensor:
    """What scaled_dot_product_attention cannot do: soft-capped scores and attention sinks."""
    geometry = layer.geometry
    scores = torch.matmul(query, key.transpose(2, 3)).float() * geometry.scaling
    if geometry.softcap is not None:
        scores = torch.tanh(scores / geometry.softcap) * geometry.softcap
    if mask is not None:
        scores = scores + mask.float()
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        fold = geometry.num_heads // geometry.num_kv_heads
        columns = sinks.float().view(geometry.num_kv_heads, fold, 1)
        columns = columns.expand(-1, -1, scores.shape[2] // fold).reshape(1, geometry.num_kv_heads, -1, 1)
        columns = columns.expand(scores.shape[0], -1, -1, -1)
        weights = torch.softmax(torch.cat([scores, columns], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)
