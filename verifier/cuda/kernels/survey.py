"""The greatest logit of each row, block by block, and whether a row is broken."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def survey_kernel(
    logits,  # [S, V] float32 or float64
    tops,  # [S, num_blocks] float64
    tokens,  # [S, num_blocks] int32
    row_stride,
    vocab,
    num_blocks,
    block: tl.constexpr,
):
    """Maximum and its lowest token in one block of one row; plus infinity stands for NaN too. Grid: (num_blocks, S)."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * block + tl.arange(0, block)
    z = tl.load(logits + row * row_stride + token, mask=token < vocab, other=-float("inf"))
    z = tl.where(z != z, float("inf"), z)
    top = tl.max(z, axis=0)
    tl.store(tops + row * num_blocks + part, top.to(tl.float64))
    tl.store(tokens + row * num_blocks + part, tl.min(tl.where(z == top, token, vocab), axis=0))


@triton.jit
def row_top(tops, tokens, row, num_blocks, blocks_pad: tl.constexpr):
    """Greatest logit of a row (float64), its lowest token, and whether the row is sound."""
    part = tl.arange(0, blocks_pad)
    is_real = part < num_blocks
    z = tl.load(tops + row * num_blocks + part, mask=is_real, other=-float("inf"))
    top = tl.max(z, axis=0)
    token = tl.load(tokens + row * num_blocks + part, mask=is_real, other=0)
    best = tl.min(tl.where(is_real & (z == top), token, 2147483647), axis=0)
    return top, best, (top < float("inf")) & (top > -float("inf"))
