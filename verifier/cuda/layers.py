"""The decoder layers compiled one by one: one graph serves all layers alike, so it takes as long as one layer does.

That holds because each layer's K/V memory hangs on its attention module as tensors, which the graph takes as inputs.
The attention is one opaque operator that declares the memory it writes. That the numbers are as good as those of the
plain pass is checked when it is made (cuda/yardstick.py); where it cannot be made, or is worse, the plain one runs.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import library
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from verifier.attention import LayerKV
from verifier.cuda.yardstick import CausalAttention, Yardstick
from verifier.model import CAPTURED_ATTRIBUTE, KV_ATTRIBUTE, Attender, AttentionInputs, Pass, Target
from verifier.private_folder import keep_compiled_graphs

_CHECKED = (17, 2, 64, 1)
"""Positions of the passes that are compared. The first one is compiled for any number, the last one for itself."""

logger = logging.getLogger(__name__)


class CompileError(Exception):
    """The pass cannot be compiled here, or would not be the same; the message is one line."""


class PagedCall:
    """The attention of one module as its compiled layer calls it; hangs on the module, with the module's memory."""

    def __init__(self, operator: Callable[..., torch.Tensor], layer: LayerKV) -> None:
        self._operator = operator
        self._k, self._v = layer.k, layer.v

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        return self._operator(query, key, value, sinks, self._k, self._v)


class CompiledLayers:
    """Runs steps of any size through the target with its layers compiled. Owns their operator, and the step's seat.

    Raises: CompileError.
    """

    def __init__(self, target: Target, names: Sequence[str], vocab_size: int) -> None:
        """`names` of the attention modules of the network, in layer order, with their memory attached."""
        self._target, self._vocab_size = target, vocab_size
        self._planned: Attender | None = None
        self._is_undone = False
        modules = dict(target.network.named_modules())
        self._layers = [_layer_of(name, modules) for name in dict.fromkeys(names)]
        kv: list[LayerKV] = [getattr(modules[name], KV_ATTRIBUTE) for name in names]
        # A graph knows its layer by the memory it was given; memory that was copied on the way would not be found.
        self._module_of = {layer.k.data_ptr(): modules[name] for layer, name in zip(kv, names, strict=True)}
        self._library = library.Library("foretoken", "FRAGMENT")  # type: ignore[no-untyped-call]
        operator = self._define(free_name("attend_paged"), kv[0].k.device.type.upper())
        for layer, name in zip(kv, names, strict=True):
            setattr(modules[name], CAPTURED_ATTRIBUTE, PagedCall(operator, layer))
        began = time.monotonic()
        try:
            keep_compiled_graphs()
            worst = self._compile()
        except Exception as error:  # whatever tracer and code generator raise
            self._undo()
            raise CompileError(" ".join(str(error).split("\n")[:2]).strip() or type(error).__name__) from error
        if not worst <= 1.0:
            self._undo()
            raise CompileError(f"its results are off by {worst:.1f} times the tolerance")
        logger.info("%d layers are compiled (%.1f s)", len(self._layers), time.monotonic() - began)

    def __call__(
        self,
        input_ids: torch.Tensor,  # [1, N] int64
        position_ids: torch.Tensor,  # [1, N] int64
        step: Attender,
        logits_index: torch.Tensor | None = None,  # as in Target
        kept: int | torch.Tensor | None = None,  # as in Target
    ) -> Pass:
        """Logits and states, as Target gives them."""
        if self._is_undone:
            return self._target(input_ids, position_ids, step, logits_index, kept)
        self._planned = step
        try:
            return self._target(input_ids, position_ids, None, logits_index, kept)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            # It wanted to compile once more, for what was not seen before, and may not; the pass can run again.
            logger.warning("the layers run as they are from now on: %s", str(error).strip().partition("\n")[0])
            self._undo()
            return self._target(input_ids, position_ids, step, logits_index, kept)
        finally:
            self._planned = None

    def _define(self, name: str, device: str) -> Callable[..., torch.Tensor]:
        """The operator that stands for attention."""
        self._library.define(  # type: ignore[no-untyped-call]
            f"{name}(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor(a!) k, Tensor(b!) v) -> Tensor"
        )
        self._library.impl(name, self._attend, device)  # type: ignore[no-untyped-call]
        library.register_fake(f"foretoken::{name}", shape_of_attention, lib=self._library)
        operator: Callable[..., torch.Tensor] = getattr(torch.ops.foretoken, name).default
        return operator

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]; writes to k and v, the layer's memory."""
        assert self._planned is not None, "a compiled attention outside of a step"
        module = self._module_of[k.data_ptr()]
        return self._planned.attend(AttentionInputs(module, query, key, value, None, None, None, sinks)).contiguous()

    def _compile(self) -> float:
        """Compile the layers; returns how far they are off, 1.0 being all that is allowed."""
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler uses what torch itself is about to remove
            yardstick = Yardstick(self._target, self._vocab_size, max(_CHECKED))
            for layer in self._layers:
                layer.compile(fullgraph=True, dynamic=True)
            self._planned = CausalAttention()
            # Called without a second chance, unlike in a step.
            return yardstick.measure([(0, self._target(*yardstick.example(size), None)) for size in _CHECKED])

    def _undo(self) -> None:
        self._is_undone = True
        for layer in self._layers:
            layer._compiled_call_impl = None


def _layer_of(name: str, modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """The member of a list of modules that module `name` is part of. Raises: CompileError if it is part of none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if isinstance(modules[".".join(parts[: count - 1])], torch.nn.ModuleList):
            return modules[".".join(parts[:count])]
    raise CompileError(f"{name} is not in a list of layers")


def shape_of_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: torch.Tensor | int | None
) -> torch.Tensor:
    """What an operator that stands for attention gives, without its numbers."""
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def free_name(kind: str) -> str:
    """A name of an operator that is not taken; the same in every process that has one, so that caches are found."""
    number = 0
    while hasattr(torch.ops.foretoken, f"{kind}_{number}"):
        number += 1
    return f"{kind}_{number}"
