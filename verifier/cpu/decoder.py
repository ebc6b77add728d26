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
from verifier.cpu.products import DTYPES
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
    same: dict[nn.Module, bool] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        same[module] = isinstance(output, torch.Tensor) and torch.equal(layers[module](*args, **named), output)

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
        products = [quick.products[some[0]] for some in matrices]
        self._seat = attention.seat(getattr(block, KV_ATTRIBUTE))
        self._dtype, self._width = block.q_proj.weight.dtype, self._seat.layer.k_dim
        if not (
            all(quick.products[each] is one for one, some in zip(products, matrices, strict=True) for each in some)
            and all(norm in quick.norms for norm in norms)
            and gated in quick.gates
            and block in quick.rotations
            and not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
            and self._seat.layer.v_dim == self._width
            and self._seat.kv.k.dtype == self._dtype
            and not self._seat.kv.geometry.has_sinks
        ):
            raise _Unlike
        self._biases = [_bias(some) for some in matrices]
        self._record = DecoderStruct(
            *(_matrix(one.product, bias) for one, bias in zip(products, self._biases, strict=True)),
            *(quick.norms[norm] for norm in norms),
            *(NormStruct() for _ in range(4 - len(norms))),
            ctypes.addressof(self._seat.layer),
            quick.gates[gated],
        )
        self._address = ctypes.addressof(self._record)
        self._function = getattr(load_library(), f"decode_{DTYPES[self._dtype]}")
        self._function.argtypes = (*[ctypes.c_void_p] * 6, ctypes.c_int64)
        self._function.restype = None

    def __call__(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        step: Any = named.get("step")
        angles: Any = named.get("position_embeddings")
        if not isinstance(step, PlannedNative) or rest or not self._takes(hidden_states, angles):
            found: torch.Tensor = self._theirs(hidden_states, *rest, **named)
            return found
        x, cos, sin = hidden_states.contiguous(), angles[0].contiguous(), angles[1].contiguous()
        out = torch.empty_like(x)
        self._function(
            self._address, step.address, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), x.shape[1]
        )  # fmt: skip
        return out

    def _takes(self, x: torch.Tensor, angles: Any) -> bool:
        """Whether rows [1, N, H] come with cosines and sines [1, N, head] that all are of the layer's type."""
        return (
            angles is not None
            and all(one.shape == (1, x.shape[1], self._width) for one in angles)
            and x.dtype == angles[0].dtype == angles[1].dtype == self._dtype
        )


def _matrix(product: Any, bias: torch.Tensor | None) -> MatrixStruct:
    return MatrixStruct(product.address, None if bias is None else bias.data_ptr(), sum(product.sizes), product.width)


def _bias(layers: Sequence[Any]) -> torch.Tensor | None:
    """Of layers side by side."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias for layer in layers]
    )
