"""Rounding to bfloat16 by hand, for Triton's interpreter, which cuts numbers off where devices round."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_bfloat16(x):
    """float32 rounded to the nearest bfloat16, ties to even, still as float32."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.int32).to(tl.float32, bitcast=True)
