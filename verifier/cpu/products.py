"""Products with the weights of a compiled pass, on a CPU: by compiled code of ours, for as many rows as a step has.

What torch calls for a product is made for many rows; a decode step has few, and then takes what reading the weight from
memory takes. Weights are packed once in the order in which they are read (products.cpp), and those that multiply the
same input become one. Sums run in one order, so that a row's result does not depend on how many others there are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import fx, library, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn import functional

from verifier.cpu.build import NoLibrary, SizesStruct, load_library

aten = torch.ops.aten

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What products are made of, and how products.cpp names it."""
_STEP = 2
"""Weights are packed for an even width, whatever they are made of."""
_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class _Packed:
    """Weights side by side as products.cpp reads them, and the tensors they were: no other may lie there."""

    blocks: torch.Tensor
    num_outputs: int
    multiply: ctypes._NamedFuncPointer
    weights: tuple[torch.Tensor, ...]


class Products:
    """Owns the packed weights. Raises: NoLibrary if there is no compiled code, or none that pays on this processor."""

    def __init__(self) -> None:
        self._library = load_library()
        if not self._library.product_is_fast():
            raise NoLibrary("products are made by torch: no vectors of 256 bits on this processor")
        self._block = int(self._library.product_block())
        self._packed: dict[tuple[tuple[int, ...], ...], _Packed] = {}

    def multiply(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """x [M, K] times each of the weights [K, N_i], side by side: [M, sum of N_i], in the dtype of all of them."""
        packed = self._packed.get(_key(weights))
        if packed is None:
            packed = self._pack(weights)
        assert (x.dtype, x.shape[1]) == (weights[0].dtype, weights[0].shape[0]), "rows that the weights do not fit"
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows, width = x.shape
        out = x.new_empty((num_rows, packed.num_outputs))
        sizes = SizesStruct(num_rows, packed.num_outputs, width, x.stride(0))
        packed.multiply(
            packed.blocks.data_ptr(), x.data_ptr(), ctypes.byref(sizes), out.data_ptr(), torch.get_num_threads()
        )
        return out

    def _pack(self, weights: Sequence[torch.Tensor]) -> _Packed:
        dtype, width = weights[0].dtype, weights[0].shape[0]
        assert all(weight.dtype == dtype and weight.shape[0] == width for weight in weights), "weights that differ"
        num_outputs = sum(weight.shape[1] for weight in weights)
        blocks = _aligned(-(-num_outputs // self._block) * self._block * (-(-width // _STEP) * _STEP), dtype)
        pack = getattr(self._library, f"pack_{DTYPES[dtype]}")
        pack.argtypes = (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 2, ctypes.c_void_p)
        first = 0
        for weight in weights:
            sizes = SizesStruct(0, weight.shape[1], width, weight.stride(1))
            pack(weight.data_ptr(), ctypes.addressof(sizes), weight.stride(0), first, blocks.data_ptr())
            first += weight.shape[1]
        multiply = getattr(self._library, f"multiply_{DTYPES[dtype]}")
        multiply.argtypes = (*[ctypes.c_void_p] * 4, ctypes.c_int)
        packed = _Packed(blocks, num_outputs, multiply, tuple(weights))
        self._packed[_key(weights)] = packed
        return packed


def are_products_ours() -> bool:
    """Whether few rows are multiplied by our code on this processor. Then bfloat16, half as long, is quicker."""
    try:
        Products()
    except NoLibrary:
        return False
    return True


def quicken(network: nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Let the linear layers of a network on a CPU, all of type `dtype`, multiply by our code where that pays.

    Returns what multiplies as functional.linear does, for weights that never change. Products kept for them keep them.
    """
    try:
        products = Products() if dtype in DTYPES else None
    except NoLibrary:
        products = None
    if products is None:
        return functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = products.multiply(x.flatten(0, -2), [weight.t()]).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    for module in network.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_call_linear, module, linear)  # type: ignore[method-assign]
    return linear


def _call_linear(module: nn.Linear, linear: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def multiply_by_torch(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """As Products.multiply, with the weights as they lie in the model.

    Torch's compiler lays them out anew, which where torch has no packed bfloat16 makes a product 8 times slower.
    """
    return torch.cat([x @ weight for weight in weights], dim=1)


def torch_packs(dtype: torch.dtype) -> bool:
    """Whether torch's compiler has packed products of this type on this processor."""
    is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # some builds have no oneDNN
    return dtype != torch.bfloat16 or (is_supported is not None and bool(is_supported()))


def define(owner: library.Library, name: str, multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`multiply` as an operator that graphs may hold, defined in a library."""
    owner.define(f"{name}(Tensor x, Tensor[] weights) -> Tensor")  # type: ignore[no-untyped-call]
    owner.impl(name, multiply, "CPU")  # type: ignore[no-untyped-call]
    library.register_fake(f"foretoken::{name}", _shape, lib=owner)
    operator: Callable[..., torch.Tensor] = getattr(torch.ops.foretoken, name).default
    return operator


class JoinProducts(CustomGraphPass):
    """Puts our operator in the place of products with constants: one for all that multiply the same input."""

    def __init__(self, operator: Callable[..., torch.Tensor]) -> None:
        self._operator = operator

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if _is_ours(node):
                found.setdefault(node.args[-2], []).append(node)
        for x, nodes in found.items():
            self._join(graph, x, nodes)

    def _join(self, graph: fx.Graph, x: fx.Node, nodes: list[fx.Node]) -> None:
        weights = [node.args[-1] for node in nodes]
        sizes = [weight.meta["val"].shape[1] for weight in weights]  # type: ignore[union-attr]
        with graph.inserting_before(nodes[0]):
            joined = graph.call_function(self._operator, (x, weights))
            joined.meta["val"] = x.meta["val"].new_empty((x.meta["val"].shape[0], sum(sizes)))
        for node, size, stop in zip(nodes, sizes, accumulate(sizes), strict=True):
            with graph.inserting_before(node):
                part = _call(graph, aten.slice.Tensor, joined, 1, stop - size, stop) if len(nodes) > 1 else joined
                if len(node.args) == 3:
                    part = _call(graph, aten.add.Tensor, part, node.args[0])
            node.replace_all_uses_with(part)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """What a cached graph depends on: this file, and the operator's name."""
        return get_hash_for_files((__file__,), extra=str(self._operator))


def _is_ours(node: fx.Node) -> bool:
    """Whether a node is input times constant, with a bias or without, of numbers that we multiply."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    weight, val = node.args[-1], node.meta["val"]
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and val.device.type == "cpu" and val.dtype in DTYPES


def _call(graph: fx.Graph, target: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
    """A call with its example result."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*[one.meta["val"] if isinstance(one, fx.Node) else one for one in args])
    return node


def _key(weights: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], ...]:
    """What tells weights from others: a matrix and its transpose, or a part of it, begin in the same place."""
    return tuple([(weight.data_ptr(), *weight.shape, *weight.stride()) for weight in weights])


def _shape(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return x.new_empty((x.shape[0], sum(weight.shape[1] for weight in weights)))


def _aligned(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [count] that begin where a line of the cache does."""
    raw = torch.zeros(count * dtype.itemsize + _ALIGNED, dtype=torch.uint8)
    start = -raw.data_ptr() % _ALIGNED
    return raw[start : start + count * dtype.itemsize].view(dtype)
