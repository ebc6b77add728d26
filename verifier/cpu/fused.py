"""A network's modules made quick for steps of few positions, on a CPU: fewer calls, each of compiled code of ours.

The forward code stays in transformers. What stands between products in a decoder layer is recognised by its names, and
replaced only where ours gives the same numbers on random input: linear layers, those of one input joined; norms by the
root of the mean square; gated activations; rotary positions. Whatever is not recognised runs as it did.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn

from verifier.cpu.build import HeadsStruct, NormStruct, load_library
from verifier.cpu.products import DTYPES, Product, has_products
from verifier.cpu.threads import team_size

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one module that multiply the same input."""
_ROTATION = "apply_rotary_pos_emb"
_ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "GELUTanh": 1}
"""By the name of their class, and how fused.cpp names them."""
_NORMS = ((0.0, 1), (0.0, 0), (1.0, 0))
"""What is added to the weight of a norm, and whether it is multiplied with what was rounded before."""
_TRIED = (3, 1)
"""Rows on which a module is compared with its own code."""
_Forward = Callable[[torch.Tensor], torch.Tensor]
_APART = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2.0**-7, 2.0**-7)}
"""How far apart the two may be, by type: in float32 the order of sums, in bfloat16 a last bit."""


@dataclass(frozen=True, slots=True)
class Quick:
    """Which modules run compiled code of ours, and what it takes."""

    products: dict[nn.Module, _Joined] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[NormStruct, torch.Tensor]] = field(default_factory=dict)
    """With the weight that the record points to."""
    gates: dict[nn.Module, int] = field(default_factory=dict)
    """Their activation."""
    rotations: set[nn.Module] = field(default_factory=set)
    """Attention modules."""
    tried: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """What fits modules of one class, type and size, found with the first of them: their code is the same."""

    def is_whole(self, network: nn.Module) -> bool:
        """Whether all matrices are multiplied by it, and a row's numbers so do not depend on the rows beside it."""
        return all(
            module in self.products or not (hasattr(module, "in_features") or _has_matrix(module))
            for module in network.modules()
        )


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a parameter of its own. (Packed weights are buffers: `in_features` tells them.)"""
    return not isinstance(module, nn.Embedding) and any(
        weight.dim() >= 2 for weight in module.parameters(recurse=False)
    )


def quicken(network: nn.Module) -> Quick:
    """Let the modules of a network run compiled code of ours, where that is the same and pays."""
    quick = Quick()
    if has_products():
        for module in network.modules():
            _quicken_linears(module, quick)
            _quicken_norm(module, quick)
            _quicken_gate(module, quick)
            _quicken_rotation(module, quick)
    return quick


def release(network: Any) -> None:
    """Give back the weights of which a quick layer has a copy of its own: else they would lie in memory twice.

    The output embedding stays, for drafters that share it.
    """
    output = network.get_output_embeddings()
    shared = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    for module in network.modules():
        if (
            _is_linear(module)
            and "forward" in vars(module)
            and module is not output
            and id(module.weight) not in shared
        ):
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


# ---- linear layers


class _Joined:
    """Linear layers that multiply the same input: the first that is called multiplies for all. Owns what it found."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.product = Product([_weight_of(layer) for layer in layers])
        self._biases: list[torch.Tensor | None] = [layer.bias for layer in layers]
        self._input: torch.Tensor | None = None
        self._parts: Sequence[torch.Tensor] = ()

    def part(self, index: int) -> _Forward:
        """The forward function of one of the layers."""
        bias, is_last = self._biases[index], index == len(self._biases) - 1

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x is not self._input:
                self._input, self._parts = x, torch.split(self.product(x), self.product.sizes, -1)
            out = self._parts[index]
            if is_last:
                self._input, self._parts = None, ()
            return out if bias is None else out + bias

        return forward


def _quicken_linears(module: nn.Module, quick: Quick) -> None:
    """The linear layers right in a module."""
    children: dict[str, Any] = {name: child for name, child in module.named_children() if _is_linear(child)}
    groups = []
    for names in _JOINED:
        if all(name in children for name in names) and _is_one_width([children[name] for name in names]):
            groups.append([children.pop(name) for name in names])
    for group in (*groups, *([child] for child in children.values())):
        joined = _Joined(group)
        for index, child in enumerate(group):
            quick.products[child], child.forward = joined, joined.part(index)


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    return type(weight) is nn.Parameter and weight.dim() == 2 and weight.dtype in DTYPES and weight.device.type == "cpu"


def _weight_of(layer: Any) -> torch.Tensor:
    """[N, K]; GPT-2's layers have it the other way round."""
    weight: torch.Tensor = layer.weight
    return weight if type(layer) is nn.Linear else weight.t()


def _is_one_width(layers: Sequence[Any]) -> bool:
    first = _weight_of(layers[0])
    return all(_weight_of(one).shape[1] == first.shape[1] and one.weight.dtype == first.dtype for one in layers)


# ---- between the products


def _quicken_norm(module: Any, quick: Quick) -> None:
    """Norms of several families differ in where they round, and in whether the weight counts from zero or one."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or not isinstance(eps, float) or weight.dim() != 1:
        return
    if weight.dtype not in DTYPES:
        return
    function = _function(f"norm_{DTYPES[weight.dtype]}", 3, 2, ctypes.c_float, ctypes.c_int, ctypes.c_int)
    padded = nn.functional.pad(weight.detach().float(), (0, -weight.shape[0] % 16))

    def make(offset: float, is_early: int) -> tuple[_Forward, tuple[NormStruct, torch.Tensor]]:
        factors = padded + offset

        def forward(x: torch.Tensor) -> torch.Tensor:
            x = x.contiguous()
            out, width = torch.empty_like(x), x.shape[-1]
            function(
                x.data_ptr(), factors.data_ptr(), out.data_ptr(), x.numel() // width, width, eps, is_early,
                team_size(),
            )  # fmt: skip
            return out

        return forward, (NormStruct(factors.data_ptr(), eps, is_early), factors)

    kind = ("norm", type(module), weight.dtype, weight.shape, eps)
    if kind not in quick.tried:
        forms = (form for form in _NORMS if _is_same(module, make(*form)[0], weight.shape[0], weight.dtype))
        quick.tried[kind] = next(forms, None)
    if quick.tried[kind] is not None:
        module.forward, quick.norms[module] = make(*quick.tried[kind])


def _quicken_gate(module: Any, quick: Quick) -> None:
    """down(act(gate(x)) * up(x)), of a module whose gate and up are joined."""
    kind = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    gate, up = (quick.products.get(getattr(module, name, None)) for name in _JOINED[1])  # type: ignore[arg-type]
    if gate is None or gate is not up or kind is None or not _is_linear(getattr(module, "down_proj", None)):
        return
    if module.gate_proj.bias is not None or module.up_proj.bias is not None:
        return
    product, down, dtype = gate.product, module.down_proj, module.gate_proj.weight.dtype
    function = _function(f"activate_{DTYPES[dtype]}", 2, 2, ctypes.c_int, ctypes.c_int)
    width = product.sizes[0]

    def forward(x: torch.Tensor) -> torch.Tensor:
        both = product(x)
        out = both.new_empty((*both.shape[:-1], width))
        function(both.data_ptr(), out.data_ptr(), out.numel() // width, width, kind, team_size())
        found: torch.Tensor = down(out)
        return found

    inputs = module.gate_proj.weight.shape[1]
    name = ("gate", type(module), dtype, inputs, width, kind)
    if name not in quick.tried:
        quick.tried[name] = _is_same(module, forward, inputs, dtype)
    if quick.tried[name]:
        module.forward, quick.gates[module] = forward, kind


def _quicken_rotation(module: Any, quick: Quick) -> None:
    """The function by which an attention module turns queries and keys, in a copy of its forward code."""
    if not _is_linear(getattr(module, "q_proj", None)):
        return
    forward = inspect.unwrap(type(module).forward)
    theirs = forward.__globals__.get(_ROTATION)
    width = getattr(module, "head_dim", 0)
    if theirs is None or not isinstance(width, int) or not width or width % 2:
        return
    dtype = module.q_proj.weight.dtype
    kind = ("rotation", theirs, dtype, width)
    if kind not in quick.tried:
        quick.tried[kind] = _rotation_like(theirs, dtype, width)
    if quick.tried[kind] is not None:
        copied = FunctionType(
            forward.__code__, {**forward.__globals__, _ROTATION: quick.tried[kind]}, forward.__name__,
            forward.__defaults__, forward.__closure__,
        )  # fmt: skip
        copied.__kwdefaults__ = forward.__kwdefaults__
        module.forward = copied.__get__(module)
        quick.rotations.add(module)


def _rotation_like(theirs: Any, dtype: torch.dtype, width: int) -> Any:
    """A function that does the same for heads of `width`; None if there is none."""
    function = _function(f"rotate_{DTYPES[dtype]}", 4, 0, ctypes.c_void_p, ctypes.c_int)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if x.stride(3) != 1:
            x = x.contiguous()
        _, heads, places, _ = x.shape
        out = x.new_empty((1, places, heads, width))
        sizes = HeadsStruct(places, heads, width, x.stride(1), x.stride(2))
        function(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), ctypes.addressof(sizes),
            team_size(),
        )  # fmt: skip
        return out.transpose(1, 2)

    def ours(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fits = cos.shape[-1] == q.shape[-1] == k.shape[-1] == width and cos.dtype == q.dtype and cos.shape[0] == 1
        if not fits or q.shape[0] != 1 or rest or named:
            found: tuple[torch.Tensor, torch.Tensor] = theirs(q, k, cos, sin, *rest, **named)
            return found
        cos, sin = cos.contiguous(), sin.contiguous()
        return turned(q, cos, sin), turned(k, cos, sin)

    angles = torch.arange(3)[None, :, None] * torch.linspace(0.01, 1.0, width // 2).repeat(2)
    example = (*_random([(1, 2, 3, width), (1, 1, 3, width)], dtype), angles.cos().to(dtype), angles.sin().to(dtype))
    try:
        pairs = zip(ours(*example), theirs(*example), strict=True)
        is_same = all(_are_near(*pair) for pair in pairs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return None  # a function of another kind
    return ours if is_same else None


def widen(logits: torch.Tensor) -> torch.Tensor:
    """Logits [K, V] in float32, without torch's threads, which meet at a barrier and wait for one that has no core."""
    if logits.dtype != torch.bfloat16:
        return logits.float()
    logits = logits.contiguous()
    out = torch.empty(logits.shape, dtype=torch.float32)
    function = _function("widen_bfloat16", 2, 2, ctypes.c_int)
    function(logits.data_ptr(), out.data_ptr(), *logits.shape, team_size())
    return out


def _is_same(module: nn.Module, forward: _Forward, width: int, dtype: torch.dtype) -> bool:
    """Whether the module's own code gives the same numbers, on rows of `width` numbers."""
    with torch.no_grad():
        return all(_are_near(forward(x), module(x)) for x in _random([(1, rows, width) for rows in _TRIED], dtype))


def _random(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    for shape in shapes:
        yield torch.randn(shape, generator=stream).to(dtype)


def _are_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    relative, absolute = _APART[one.dtype]
    scale = float(other.float().abs().mean()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=relative, atol=absolute * scale)


def _function(name: str, num_arrays: int, num_sizes: int, *rest: Any) -> Any:
    """A function of the compiled code that takes so many arrays, then sizes, then the rest."""
    function = getattr(load_library(), name)
    function.argtypes = (*[ctypes.c_void_p] * num_arrays, *[ctypes.c_int64] * num_sizes, *rest)
    function.restype = None
    return function
