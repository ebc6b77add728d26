"""Products with weights that never change, on a CPU, by compiled code of ours: for as many rows as a step has.

What torch calls for a product is made for many rows; a decode step has few, and then takes what reading the weight from
memory takes. Weights are packed once in the order in which they are read (products.cpp), and those that multiply the
same input lie side by side. Sums run in one order, so that a row's result does not depend on how many others there are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from verifier.cpu.build import NoLibrary, SizesStruct, load_library
from verifier.cpu.threads import team_size

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What products are made of, and how the compiled code names it."""
_ALIGNED = 64


def has_products() -> bool:
    """Whether few rows are multiplied by our code on this processor. Then bfloat16, half as long, is quicker."""
    try:
        return bool(load_library().product_is_fast())
    except NoLibrary:
        return False


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself: then it is about twice as quick as float32."""
    return has_products() and bool(load_library().product_in_bfloat16())


def multiplier(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What multiplies [..., K] with `weight` [N, K], which never changes: a Product where that pays, else torch."""
    is_ours = weight.device.type == "cpu" and weight.dtype in DTYPES and has_products()
    return Product([weight]) if is_ours else partial(functional.linear, weight=weight)


class Product:
    """Weights of one input side by side. Owns their packed copy; the weights themselves are not kept."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        """`weights` [N_i, K] on the CPU, of one type of DTYPES; there must be products (has_products)."""
        library, (dtype, width) = load_library(), (weights[0].dtype, weights[0].shape[1])
        assert all(weight.dtype == dtype and weight.shape[1] == width for weight in weights), "weights that differ"
        self.sizes = [weight.shape[0] for weight in weights]
        """N_i"""
        self._num_outputs, self.dtype, self.width = sum(self.sizes), dtype, width
        block, step = int(library.product_block()), int(library.product_step())
        self._blocks = _aligned(-(-self._num_outputs // block) * block * (-(-width // step) * step), dtype)
        pack = getattr(library, f"pack_{DTYPES[dtype]}")
        pack.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int)
        first, threads = 0, team_size()
        for weight in weights:
            sizes = SizesStruct(0, weight.shape[0], width, weight.stride(0))
            pack(weight.data_ptr(), ctypes.addressof(sizes), weight.stride(1), first, self._blocks.data_ptr(), threads)
            first += weight.shape[0]
        self.address = self._blocks.data_ptr()
        self._multiply = getattr(library, f"multiply_{DTYPES[dtype]}")
        self._multiply.argtypes = (*[ctypes.c_void_p] * 4, ctypes.c_int)
        self._multiply.restype = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] times all weights: [..., sum of N_i]."""
        assert x.dtype == self.dtype and x.shape[-1] == self.width, f"{x.dtype} {tuple(x.shape)} for {self.width}"  # noqa: PT018
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = x.new_empty((*x.shape[:-1], self._num_outputs))
        sizes = SizesStruct(rows.shape[0], self._num_outputs, self.width, rows.stride(0))
        self._multiply(self.address, rows.data_ptr(), ctypes.addressof(sizes), out.data_ptr(), team_size())
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._blocks.nbytes


def _aligned(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [count] that begin where a line of the cache does."""
    raw = torch.from_numpy(np.zeros(count * dtype.itemsize + _ALIGNED, np.uint8))  # zeroed by the system, as it is used
    start = -raw.data_ptr() % _ALIGNED
    return raw[start : start + count * dtype.itemsize].view(dtype)
