"""The second half of split attention: partial sums of several splits become one result."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from verifier.cuda.kernels.rounding import round_bfloat16
from verifier.cuda.kernels.span import find_segment, key_range


@triton.jit(do_not_specialize=["num_positions", "num_splits", "num_programs", "min_keys"])
def combine_kernel(
    out,  # [N, heads, v_dim]
    mixes,  # [items, kv_heads, splits, block_m, v_dim] float32
    tops,  # [items, kv_heads, splits, block_m] float32
    totals,  # [items, kv_heads, splits, block_m] float32
    header,  # [4] int64
    starts,  # [segments_pad + 1] int32
    prefix_lens,  # [segments_pad] int32
    num_positions,
    num_splits,
    num_programs,
    min_keys,
    is_emulated: tl.constexpr,  # see attend_kernel
    window: tl.constexpr,
    kv_heads: tl.constexpr,
    fold: tl.constexpr,
    v_dim: tl.constexpr,
    v_pad: tl.constexpr,
    segments_pad: tl.constexpr,
    block_q: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_r: tl.constexpr,
):
    """Join the splits of `block_r` lines of a tile. Grid: (query blocks, kv_heads, block_m / block_r)."""
    item, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment, first_query = find_segment(item, starts, segments_pad, block_q)
    begin = tl.load(starts + segment)
    num = tl.load(starts + segment + 1) - begin
    if (first_query >= num) | (segment >= tl.load(header)):
        return
    is_tree = segment < tl.load(header + 1)
    span = (tl.load(prefix_lens + segment), num, first_query, is_tree)
    bounds = (num_splits, num_programs, min_keys)
    first, end, share = key_range(header, span, bounds, block_q, block_n, window, kv_heads)
    if end - first <= share:
        return
    used = (end - first + share - 1) // share
    line = part * block_r + tl.arange(0, block_r)
    place = first_query + line // fold
    is_query = (line // fold < block_q) & (place < num) & (begin + place < num_positions)
    base = (item * kv_heads + kv_head).to(tl.int64) * num_splits * block_m
    top = tl.full([block_r], -float("inf"), tl.float32)
    for split in range(0, used):
        top = tl.maximum(top, tl.load(tops + base + split * block_m + line, mask=is_query, other=0.0))
    wide = tl.arange(0, v_pad)
    is_out = is_query[:, None] & (wide[None, :] < v_dim)
    total = tl.zeros([block_r], tl.float32)
    mix = tl.zeros([block_r, v_pad], tl.float32)
    for split in range(0, used):
        index = base + split * block_m + line
        weight = tl.exp2(tl.load(tops + index, mask=is_query, other=0.0) - top)
        total += weight * tl.load(totals + index, mask=is_query, other=1.0)
        mix += weight[:, None] * tl.load(mixes + index[:, None] * v_dim + wide[None, :], mask=is_out, other=0.0)
    head = kv_head * fold + line % fold
    pointers = out + ((begin + place).to(tl.int64) * (kv_heads * fold) + head)[:, None] * v_dim + wide[None, :]
    result = mix / total[:, None]
    if is_emulated:
        result = round_bfloat16(result)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=is_out)
