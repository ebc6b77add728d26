"""Which keys a block of queries reads, and how they are shared out among splits: alike in every program of a step."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

HEADER_NUM_SEGMENTS, HEADER_NUM_TREES, HEADER_NUM_KEYS, HEADER_AREA = 0, 1, 2, 3
"""Places in the header of a step: segments, trees among them, keys of all segments, keys times queries."""


@triton.jit
def find_segment(item, starts, segments_pad: tl.constexpr, block_q: tl.constexpr):
    """Segment of a block of queries, and the first query of the block within it.

    Segment g begins at block (starts[g] + g * (block_q - 1)) // block_q, which leaves room for every segment's last,
    partly filled block whatever the lengths are: the grid then depends on sums alone.
    """
    segments = tl.arange(0, segments_pad)
    begins = tl.load(starts + segments)  # [segments_pad] int32
    blocks = (begins + segments * (block_q - 1)) // block_q
    segment = tl.sum((blocks <= item).to(tl.int32), axis=0) - 1
    begin = tl.load(starts + segment)
    block = (begin + segment * (block_q - 1)) // block_q
    return segment, (item - block) * block_q


@triton.jit
def key_range(
    header,
    span,  # prefix length, positions of the segment, first query, whether it is a tree
    bounds,  # most splits, programs that fill the device, least keys of a split
    block_q: tl.constexpr,
    block_n: tl.constexpr,
    window: tl.constexpr,
    kv_heads: tl.constexpr,
):
    """First key, end, and keys per split of a block of queries; sequence slots, the first one a multiple of block_n.

    Shares are about equal over all work of the step, so that one long row is cut into more splits than the short ones
    beside it. The grid holds `num_splits` for each; what is not needed ends at once. A small rest is no split.
    """
    prefix, num, first_query, is_tree = span
    num_splits, num_programs, min_keys = bounds
    end = prefix + tl.where(is_tree, num, tl.minimum(first_query + block_q, num))
    first = 0
    if window > 0:
        lowest = prefix + tl.where(is_tree, 0, first_query)  # position of the block's first query; a root has depth 0
        first = tl.maximum(lowest - window + 1, 0) // block_n * block_n
    work = tl.maximum(tl.load(header + 2), tl.load(header + 3) // block_q) * kv_heads
    share = tl.maximum((work + num_programs - 1) // num_programs, min_keys).to(tl.int32)
    splits = tl.maximum((end - first - min_keys // 2 + share - 1) // share, 1)
    share = tl.cdiv(end - first, tl.minimum(splits, num_splits))
    return first, end, tl.cdiv(share, block_n) * block_n
