"""Accepted K/V to their places, in all layers of one pool tensor, in one launch."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from verifier.cuda.kernels import OPTIONS

_BLOCK = 1024
"""Numbers of a slot that a program moves."""


@triton.jit(do_not_specialize=["group_size"])
def move_kernel(
    pool,  # [layers, slots, heads, dim]
    sources,  # [m] int64
    targets,  # [m] int64
    group_size,
    layer_stride,
    slot_stride,
    width: tl.constexpr,  # heads * dim
    block: tl.constexpr,
):
    """One group of moves, one part of the slots' numbers, one layer. Grid: (groups, width / block, layers).

    The moves of a group run in order, and each number of a slot is read and written by the same thread in all of
    them: what a later move writes cannot disturb an earlier one. What an earlier one wrote is never read later, since
    no target is the source of a later move: sources ascend and no target is greater than its source.
    """
    group = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    origin = pool + tl.program_id(2).to(tl.int64) * layer_stride + columns
    is_real = columns < width
    for move in range(group * group_size, (group + 1) * group_size):
        source, target = tl.load(sources + move), tl.load(targets + move)
        if source != target:
            tl.store(origin + target * slot_stride, tl.load(origin + source * slot_stride, mask=is_real), mask=is_real)


def move(
    pool: torch.Tensor,  # [layers, slots, heads, dim]
    sources: torch.Tensor,  # [m] int64
    targets: torch.Tensor,  # [m] int64
    num_groups: int = 1,
) -> None:
    """Copy slots `sources` to slots `targets` in all layers, as verifier.kv.move_slots does with torch.

    Args: the moves come in `num_groups` groups of equal size, which touch no slots of each other: one for each row.
        Within a group, in the order of the sequence, sources ascend and no target lies behind its source: so it is
        for the nodes of a path, root first, since a node at depth d has a number >= d and numbers ascend along a path.
        A move of a slot to itself does nothing.
    """
    layers, _, heads, dim = pool.shape
    block = min(_BLOCK, triton.next_power_of_2(heads * dim))
    move_kernel[(num_groups, triton.cdiv(heads * dim, block), layers)](
        pool,
        sources,
        targets,
        sources.shape[0] // num_groups,
        pool.stride(0),
        pool.stride(1),
        heads * dim,
        block,
        num_stages=1,
        **OPTIONS,
    )
