"""Whole decoder layers, each in one call of compiled code in place of thirty, and the calls of Python between them.

Only for layers of families that are known by name, and only where the call gives, on a step that is tried at load, the
numbers of the layer's own code to the bit: that code runs the same functions of ours, one after the other.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from verifier.cpu.attention import NativeAttention, PlannedNative
from verifier.cpu.build import DecoderStruct, MatrixStruct, NormStruct, load_library
from verifier.cpu.fused import Quick
from verifier.cpu.products import DTYPES, Product
from verifier.model import KV_ATTRIBUTE

_FAMILIES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
"""x + attention(norm(x)), and to that its gated layer of its norm; queries and keys are turned, some normed before."""


class _Unlike(Exception):
    """A layer is not what its name says."""


def join_layers(network: nn.Module, quick: Quick, attention: NativeAttention, run: Callable[[], object]) -> int:
    """Let decoder layers run in one call each.

    Args: `quick` is what was made quick in the network; `run` makes a small step, whose K/V nobody reads.
    Returns: how many layers do.
    """
    layers: dict[nn.Module, _Layer] = {}
    for module in network.modules():
        if type(module).__name__ in _FAMILIES:
            with contextlib.suppress(_Unlike):
                layers[module] = _Layer(module, quick, attention)
    if not layers:
        return 0
    same: dict[nn.Module, bool] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        found = layers[module].attempt(*args, **named)
        same[module] = found is not None and isinstance(output, torch.Tensor) and torch.equal(found, output)

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for module, is_same in same.items():
        if is_same:
            module.forward = layers[module]
    return sum(same.values())


class _Layer:
    """The forward function of a decoder layer. Owns the record that the compiled code reads, and what that points to.

    Raises: _Unlike if one of the layer's parts is not what the call computes.
    """

    def __init__(self, layer: Any, quick: Quick, attention: NativeAttention) -> None:
        block, gated, self._theirs = layer.self_attn, layer.mlp, layer.forward
        matrices = [[block.q_proj, block.k_proj, block.v_proj], [block.o_proj]]
        matrices += [[gated.gate_proj, gated.up_proj], [gated.down_proj]]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [block.q_norm, block.k_norm] if hasattr(block, "q_norm") else []
        if not all(each in quick.products for some in matrices for each in some):
            raise _Unlike
        self._block, self._products = block, [quick.products[some[0]] for some in matrices]
        self._norms = [quick.norms[norm] for norm in norms if norm in quick.norms]
        self._seat = attention.seat(getattr(block, KV_ATTRIBUTE))
        self._dtype, self._width = block.q_proj.weight.dtype, self._seat.layer.k_dim
        if not (
            all(
                quick.products[each] is one for one, some in zip(self._products, matrices, strict=True) for each in some
            )
            and len(self._norms) == len(norms)
            and gated in quick.gates
            and block in quick.rotations
            and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
            and self._seat.layer.v_dim == self._width
            and self._seat.kv.k.dtype == self._dtype
            and not self._seat.kv.geometry.has_sinks
            and self._has_sizes([one.product for one in self._products])
        ):
            raise _Unlike
        self._biases = [_bias(some) for some in matrices]
        self._record = DecoderStruct(
            *(_matrix(one.product, bias) for one, bias in zip(self._products, self._biases, strict=True)),
            *(record for record, _ in self._norms),
            *(NormStruct() for _ in range(4 - len(norms))),
            ctypes.addressof(self._seat.layer),
            quick.gates[gated],
        )
        self._address = ctypes.addressof(self._record)
        self._function = getattr(load_library(), f"decode_{DTYPES[self._dtype]}")
        self._function.argtypes = (*[ctypes.c_void_p] * 6, ctypes.c_int64)
        self._function.restype = None

    def _has_sizes(self, products: Sequence[Product]) -> bool:
        """Whether the sizes are those that the compiled code takes for granted."""
        heads, out, gates, down = products
        layer, hidden = self._seat.layer, heads.width
        queries, keys = layer.num_heads * self._width, layer.num_kv_heads * self._width
        return (
            heads.sizes == [queries, keys, keys]
            and (out.width, out.sizes) == (queries, [hidden])
            and (gates.width, gates.sizes) == (hidden, [down.width] * 2)
            and down.sizes == [hidden]
            and {one.dtype for one in products} == {self._dtype}
        )

    def __call__(self, *args: Any, **named: Any) -> torch.Tensor:
        out = self.attempt(*args, **named)
        if out is not None:
            return out
        theirs: torch.Tensor = self._theirs(*args, **named)
        return theirs

    def attempt(
        self, x: torch.Tensor, *rest: Any, step: Any = None, position_embeddings: Any = None, **_: Any
    ) -> torch.Tensor | None:
        """Run the call on rows [1, N, H]; None if it was not made for what is given."""
        if not isinstance(step, PlannedNative) or rest or not self._takes(x, step, position_embeddings):
            return None
        x, (cos, sin) = x.contiguous(), (angles.contiguous() for angles in position_embeddings)
        out = torch.empty_like(x)
        self._function(
            self._address, step.address, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), x.shape[1]
        )  # fmt: skip
        return out

    def _takes(self, x: torch.Tensor, step: PlannedNative, angles: Any) -> bool:
        """Whether the rows are the step's, and come with cosines and sines [1, N, head], all of the layer's type."""
        rows = step.num_positions
        return (
            angles is not None
            and x.shape[:2] == (1, rows)
            and all(one.shape == (1, rows, self._width) for one in angles)
            and x.dtype == angles[0].dtype == angles[1].dtype == self._dtype
            and getattr(self._block, KV_ATTRIBUTE) is self._seat.kv
        )


def _matrix(product: Product, bias: torch.Tensor | None) -> MatrixStruct:
    return MatrixStruct(product.address, None if bias is None else bias.data_ptr(), sum(product.sizes), product.width)


def _bias(layers: Sequence[Any]) -> torch.Tensor | None:
    """Of layers side by side."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias for layer in layers]
    )
