"""Attention over pages: one pass over a row's keys serves a block of its queries and all heads that share the keys.

The sequence axis is cut into splits that run side by side and keep partial sums (FlashDecoding; softmax kept online as
in FlashAttention, Dao et al. 2022); `combine_kernel` joins the splits. What a query may see is computed from its
place: the prefix, then the chunk up to itself or the ancestors named by a 64-bit set.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from verifier.cuda.kernels.rounding import round_bfloat16
from verifier.cuda.kernels.span import find_segment, key_range

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    """tanh to about one unit of float32 in 1: a series near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    square = x * x
    series = -0.00886323552990220
    series = series * square + 0.0218694885361552
    series = series * square - 0.0539682539682540
    series = series * square + 0.133333333333333
    series = series * square - 0.333333333333333
    near = x + x * square * series
    grown = tl.exp(2.0 * tl.minimum(tl.abs(x), 20.0))
    far = 1.0 - 2.0 / (grown + 1.0)
    return tl.where(square < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def _scores(query, key, scaling: tl.constexpr, softcap: tl.constexpr):
    """Scores in base 2: [block_m, block_n] float32."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if softcap > 0:
        return _tanh(scores * (scaling / softcap)) * (softcap * _LOG2E)
    return scores * (scaling * _LOG2E)


@triton.jit
def _fold_in(scores, value, top, total, mix, is_emulated: tl.constexpr):
    """One more tile of the online softmax. A query that has seen nothing yet keeps a top of minus infinity."""
    higher = tl.maximum(top, tl.max(scores, axis=1))
    pivot = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - pivot[:, None])
    shrink = tl.exp2(top - pivot)
    total = total * shrink + tl.sum(weights, axis=1)
    weights = round_bfloat16(weights) if is_emulated else weights.to(value.dtype)
    mix = tl.dot(weights, value, mix * shrink[:, None], input_precision="ieee")
    return higher, total, mix


@triton.jit
def _load_pages(pages, places, end, page_size: tl.constexpr):
    """Pages of sequence places before `end`: [block_n] int32. One tile ahead, so that K/V are fetched ahead as well."""
    return tl.load(pages + places // page_size, mask=places < end, other=0)


@triton.jit
def _load_rows(pool, slots, is_real, slot_stride, dim: tl.constexpr, pad: tl.constexpr, is_emulated: tl.constexpr):
    """[block_n, pad] keys or values; zeros where there is none, as 0 * NaN would be NaN."""
    columns = tl.arange(0, pad)
    pointers = pool + slots[:, None] * slot_stride + columns[None, :]
    rows = tl.load(pointers, mask=is_real[:, None] & (columns[None, :] < dim), other=0.0)
    return rows.to(tl.float32) if is_emulated else rows


@triton.jit(do_not_specialize=["num_positions", "num_splits", "num_programs", "min_keys"])
def attend_kernel(
    query,  # [N, heads, k_dim]
    key_pool,  # [slots, kv_heads, k_dim]
    value_pool,  # [slots, kv_heads, v_dim]
    out,  # [N, heads, v_dim]
    sinks,  # [heads]
    mixes,  # [items, kv_heads, splits, block_m, v_dim] float32
    tops,  # [items, kv_heads, splits, block_m] float32
    totals,  # [items, kv_heads, splits, block_m] float32
    header,  # [4] int64
    starts,  # [segments_pad + 1] int32; what lies behind the last segment is padding
    rows,  # [segments_pad] int32
    prefix_lens,  # [segments_pad] int32
    depths,  # [N] int32
    ancestors,  # [N] int64
    page_table,  # [M, pages per row] int32
    num_positions,
    num_splits,
    num_programs,
    min_keys,
    query_stride,
    head_stride,
    key_stride,
    value_stride,
    key_head_stride,
    value_head_stride,
    page_stride,
    scaling: tl.constexpr,
    softcap: tl.constexpr,  # 0: none
    window: tl.constexpr,  # 0: none
    has_sinks: tl.constexpr,
    is_emulated: tl.constexpr,  # bfloat16 in the interpreter, which can neither multiply nor round it
    kv_heads: tl.constexpr,
    fold: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    k_pad: tl.constexpr,
    v_pad: tl.constexpr,
    page_size: tl.constexpr,
    segments_pad: tl.constexpr,
    block_q: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
):
    """One block of queries of one segment, one K/V head, one split of the keys.

    Grid: (query blocks, kv_heads, splits). Row m of a tile is query m // fold, head m % fold of the group. A segment
    that needs one split is finished here; the others leave their sums for `combine_kernel`. Positions behind the last
    segment, which pad a step to a bucket, get zeros.
    """
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment, first_query = find_segment(item, starts, segments_pad, block_q)
    begin = tl.load(starts + segment)
    num = tl.load(starts + segment + 1) - begin
    if first_query >= num:
        return
    line = tl.arange(0, block_m)
    place = first_query + line // fold
    is_query = (line // fold < block_q) & (place < num) & (begin + place < num_positions)
    position = (begin + place).to(tl.int64)  # packed
    head = kv_head * fold + line % fold
    wide = tl.arange(0, v_pad)
    out_pointers = out + (position * (kv_heads * fold) + head)[:, None] * v_dim + wide[None, :]
    is_out = is_query[:, None] & (wide[None, :] < v_dim)
    if segment >= tl.load(header):
        if split == 0:
            tl.store(out_pointers, tl.zeros([block_m, v_pad], out.dtype.element_ty), mask=is_out)
        return
    is_tree = segment < tl.load(header + 1)
    prefix = tl.load(prefix_lens + segment)
    span, bounds = (prefix, num, first_query, is_tree), (num_splits, num_programs, min_keys)
    first, end, share = key_range(header, span, bounds, block_q, block_n, window, kv_heads)
    low = first + split * share
    if low >= end:
        return
    high = tl.minimum(low + share, end)

    columns = tl.arange(0, k_pad)
    query_pointers = query + (position * query_stride + head.to(tl.int64) * head_stride)[:, None] + columns[None, :]
    queries = tl.load(query_pointers, mask=is_query[:, None] & (columns[None, :] < k_dim), other=0.0)
    if is_emulated:
        queries = queries.to(tl.float32)
    depth = tl.load(depths + position, mask=is_query, other=0)
    bits = tl.load(ancestors + position, mask=is_query, other=0)
    pages = page_table + tl.load(rows + segment).to(tl.int64) * page_stride
    keys, values = key_pool + kv_head * key_head_stride, value_pool + kv_head * value_head_stride
    top = tl.full([block_m], -float("inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    if has_sinks:  # noqa: SIM102 - one is known when the kernel is compiled, one is not
        # A sink is a key without a value, seen once: the first split starts with it.
        if split == 0:
            top = tl.load(sinks + head, mask=is_query, other=0.0).to(tl.float32) * _LOG2E
            total = total + 1.0
    mix = tl.zeros([block_m, v_pad], tl.float32)
    offsets = tl.arange(0, block_n)

    page = _load_pages(pages, low + offsets, high, page_size)

    # Whole tiles of the prefix, and of a chunk ahead of the block: every query sees every key, but for the window.
    whole = tl.minimum(high, (prefix + tl.where(is_tree, 0, first_query)) // block_n * block_n)
    for start in range(low, whole, block_n):
        keys_here = start + offsets
        always = keys_here >= 0
        slots = page.to(tl.int64) * page_size + keys_here % page_size
        page = _load_pages(pages, keys_here + block_n, high, page_size)
        key = _load_rows(keys, slots, always, key_stride, k_dim, k_pad, is_emulated)
        scores = _scores(queries, key, scaling, softcap)
        if window > 0:
            is_near = keys_here[None, :] > (prefix + depth - window)[:, None]
            scores = tl.where(is_near, scores, -float("inf"))
        value = _load_rows(values, slots, always, value_stride, v_dim, v_pad, is_emulated)
        top, total, mix = _fold_in(scores, value, top, total, mix, is_emulated)

    # The rest: queries see some keys and not others.
    for start in range(tl.maximum(low, whole), high, block_n):
        keys_here = start + offsets
        is_real = keys_here < end
        own = keys_here - prefix
        slots = page.to(tl.int64) * page_size + keys_here % page_size
        page = _load_pages(pages, keys_here + block_n, high, page_size)
        key = _load_rows(keys, slots, is_real, key_stride, k_dim, k_pad, is_emulated)
        scores = _scores(queries, key, scaling, softcap)
        if is_tree:
            shift = tl.minimum(tl.maximum(own, 0), 63).to(tl.int64)
            is_seen = ((bits[:, None] >> shift[None, :]) & 1) != 0
        else:
            is_seen = own[None, :] <= place[:, None]
        is_seen = (is_seen | (own < 0)[None, :]) & is_real[None, :]
        if window > 0:
            own_depth = tl.load(depths + begin + own, mask=is_real & (own >= 0), other=0)
            where = tl.where(own >= 0, prefix + own_depth, keys_here)
            is_seen = is_seen & (where[None, :] > (prefix + depth - window)[:, None])
        scores = tl.where(is_seen, scores, -float("inf"))
        value = _load_rows(values, slots, is_real, value_stride, v_dim, v_pad, is_emulated)
        top, total, mix = _fold_in(scores, value, top, total, mix, is_emulated)

    if end - first <= share:
        result = mix / tl.where(is_query, total, 1.0)[:, None]
        if is_emulated:
            result = round_bfloat16(result)
        tl.store(out_pointers, result.to(out.dtype.element_ty), mask=is_out)
    else:
        line_index = ((item * kv_heads + kv_head).to(tl.int64) * num_splits + split) * block_m + line
        tl.store(tops + line_index, top, mask=is_query)
        tl.store(totals + line_index, total, mask=is_query)
        tl.store(mixes + line_index[:, None] * v_dim + wide[None, :], mix, mask=is_out)
