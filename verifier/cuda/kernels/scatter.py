"""Keys and values of a step's positions to their slots, in one launch for both."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from verifier.cuda.kernels import OPTIONS

_TILE = 2048
"""Numbers a program holds at once."""


@triton.jit
def _copy_lines(
    source,  # [kv_heads, N, dim]
    target,  # [slots, kv_heads, dim]
    place,  # position, head and slot of each line, and which lines are real: [lines] each
    strides,  # of the source: position, head; of the target: slot
    dim: tl.constexpr,
    pad: tl.constexpr,
):
    position, head, slot, is_line = place
    position_stride, head_stride, slot_stride = strides
    columns = tl.arange(0, pad)
    is_real = is_line[:, None] & (columns[None, :] < dim)
    origin = source + position * position_stride + head * head_stride
    aim = target + slot * slot_stride + head * dim
    numbers = tl.load(origin[:, None] + columns[None, :], mask=is_real)
    tl.store(aim[:, None] + columns[None, :], numbers, mask=is_real)


@triton.jit(do_not_specialize=["num_lines"])
def scatter_kernel(
    key,  # [kv_heads, N, k_dim]
    value,  # [kv_heads, N, v_dim]
    write_slots,  # [N] int64
    key_pool,  # [slots, kv_heads, k_dim]
    value_pool,  # [slots, kv_heads, v_dim]
    num_lines,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    key_slot_stride,
    value_slot_stride,
    kv_heads: tl.constexpr,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    k_pad: tl.constexpr,
    v_pad: tl.constexpr,
    lines: tl.constexpr,
):
    """A block of lines, which are heads of positions. Grid: N * kv_heads / lines."""
    line = tl.program_id(0) * lines + tl.arange(0, lines)
    is_line = line < num_lines
    position, head = (line // kv_heads).to(tl.int64), (line % kv_heads).to(tl.int64)
    slot = tl.load(write_slots + position, mask=is_line, other=0)
    place = (position, head, slot, is_line)
    _copy_lines(key, key_pool, place, (key_stride, key_head_stride, key_slot_stride), k_dim, k_pad)
    _copy_lines(value, value_pool, place, (value_stride, value_head_stride, value_slot_stride), v_dim, v_pad)


def scatter(
    key: torch.Tensor,  # [kv_heads, N, k_dim]
    value: torch.Tensor,  # [kv_heads, N, v_dim]
    write_slots: torch.Tensor,  # [N] int64
    key_pool: torch.Tensor,  # [slots, kv_heads, k_dim]
    value_pool: torch.Tensor,  # [slots, kv_heads, v_dim]
) -> None:
    """Store new keys and values in their slots, as verifier.attention.write_kv does with torch.

    The order is open where a slot is named twice, as the trash page may be.
    """
    assert write_slots.shape[0] == key.shape[1], f"{write_slots.shape[0]} slots for {key.shape[1]} positions"
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    kv_heads, num_positions, k_dim = key.shape
    v_dim = value.shape[2]
    k_pad, v_pad = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    num_lines = num_positions * kv_heads
    lines = max(1, min(triton.next_power_of_2(num_lines), _TILE // max(k_pad, v_pad)))
    scatter_kernel[(triton.cdiv(num_lines, lines),)](
        key,
        value,
        write_slots,
        key_pool,
        value_pool,
        num_lines,
        key.stride(1),
        key.stride(0),
        value.stride(1),
        value.stride(0),
        key_pool.stride(0),
        value_pool.stride(0),
        kv_heads,
        k_dim,
        v_dim,
        k_pad,
        v_pad,
        lines,
        **OPTIONS,
    )
