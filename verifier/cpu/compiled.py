"""The forward pass compiled for a CPU: fused operations, weights packed once in the layout that its products want.

transformers' own forward code goes through torch.compile with its weights frozen; the attention is one opaque operator
per layer. One graph serves every step: the numbers of positions, of wanted states and of logits are symbols. Results
differ from the plain pass in rounding only, which is checked when it is made (verifier/yardstick.py); where it cannot
be made, or is further off, the caller runs the pass as before.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import library
from torch._inductor import config as inductor_config

from verifier.cpu.build import NoLibrary
from verifier.cpu.products import DTYPES, JoinProducts, Products, define, multiply_by_torch, torch_packs
from verifier.model import CAPTURED_ATTRIBUTE, Attender, AttentionInputs, Pass, Target
from verifier.private_folder import keep_compiled_graphs
from verifier.torch.capture import Stub, without_guards
from verifier.yardstick import CausalAttention, Yardstick

_EXAMPLE = (7, 5, 3)
"""Positions, wanted states and logits of the pass that is compiled: none equal, so that no two become one symbol."""
_CHECKED = ((1, 1, 1), (2, 2, 2), (17, 17, 17), (100, 12, 9))
"""Of each pass that is compared. Our products take 96 rows at a time."""

logger = logging.getLogger(__name__)


class CompileError(Exception):
    """The pass cannot be compiled here, or would not be the same; the message is one line."""


class CompiledForward:
    """Runs steps of any size through the compiled pass. Owns it, its operator, and the seat of the step's plan.

    Raises: CompileError.
    """

    def __init__(self, target: Target, modules: Sequence[torch.nn.Module], vocab_size: int) -> None:
        """`modules` are the attention modules of the network, in layer order."""
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise CompileError("compiling for a CPU needs g++")
        self._target, self._modules, self._vocab_size = target, modules, vocab_size
        self._planned: Attender | None = None
        self._library = library.Library("foretoken", "FRAGMENT")  # type: ignore[no-untyped-call]
        self._define(free_name("attend"))
        self._options = self._inductor_options()
        began = time.monotonic()
        try:
            keep_compiled_graphs()
            self._run = self._compile()
            worst = self._check()
        except Exception as error:  # whatever tracer, code generator and C++ compiler raise
            raise CompileError(" ".join(str(error).split("\n")[:2]).strip() or type(error).__name__) from error
        if not worst <= 1.0:
            raise CompileError(f"its results are off by {worst:.1f} times the tolerance")
        logger.info("the forward pass is compiled (%.1f s)", time.monotonic() - began)

    def __call__(
        self,
        input_ids: torch.Tensor,  # [1, N] int64
        position_ids: torch.Tensor,  # [1, N] int64
        planned: Attender,
        logits_index: torch.Tensor | None = None,  # [K + tails] int64, or None for all N
        num_logits: int | None = None,  # K, or None for all that the index names
    ) -> Pass:
        """Logits [K, V] and states [K + tails, H], as Target gives them."""
        num_positions = input_ids.shape[1]
        index = torch.arange(num_positions) if logits_index is None else logits_index
        num_wanted = index.shape[0]
        num_logits = num_wanted if num_logits is None else num_logits
        if not num_wanted:  # a product of no rows is none that the graph knows
            index = torch.zeros(1, dtype=torch.int64)
        self._planned = planned
        logits, states = self._run(input_ids, position_ids, index, torch.arange(max(1, num_logits)))
        self._planned = None
        return logits[:num_logits], states[:num_wanted]

    def _define(self, name: str) -> None:
        """The operator that stands for attention, and the call of it in every attention module."""
        self._library.define(  # type: ignore[no-untyped-call]
            f"{name}(Tensor query, Tensor key, Tensor value, Tensor? sinks, SymInt layer) -> Tensor"
        )
        self._library.impl(name, self._attend, "CPU")  # type: ignore[no-untyped-call]
        library.register_fake(f"foretoken::{name}", shape_of_attention, lib=self._library)
        operator = getattr(torch.ops.foretoken, name).default
        for layer, module in enumerate(self._modules):
            setattr(module, CAPTURED_ATTRIBUTE, _caller(operator, layer))

    def _inductor_options(self) -> dict[str, Any]:
        """Weights are constants, multiplied by our own code where it pays, else packed and joined by torch."""
        multiply = self._multiply() if self._is_plain() else None
        if multiply is None:
            return {"freezing": True, "cpp.enable_concat_linear": True}
        join = JoinProducts(define(self._library, free_name("multiply"), multiply))
        return {"freezing": True, "cpp.weight_prepack": False, "post_grad_custom_pre_pass": join}

    def _multiply(self) -> Callable[..., torch.Tensor] | None:
        """What multiplies in the place of torch's compiler, if anything is better."""
        with contextlib.suppress(NoLibrary):
            return Products().multiply
        dtypes = {parameter.dtype for parameter in self._target.network.parameters()}
        return None if all(map(torch_packs, dtypes)) else multiply_by_torch

    def _is_plain(self) -> bool:
        """Whether our code multiplies all weights there are: torch has products of its own for quantised ones."""
        parameters = [*self._target.network.parameters()]
        return all(type(one) is torch.nn.Parameter and one.dtype in DTYPES for one in parameters)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, layer: int
    ) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        assert self._planned is not None, "a compiled attention outside of a step"
        inputs = AttentionInputs(self._modules[layer], query, key, value, None, None, None, sinks)
        return self._planned.attend(inputs).contiguous()

    def _compile(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        target = self._target

        def run(
            input_ids: torch.Tensor, position_ids: torch.Tensor, index: torch.Tensor, kept: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            logits, states = target(input_ids, position_ids, None, index, kept)
            assert states is not None, "the network does not say which module its output embedding is"
            return logits, states

        # Dynamo keeps its graphs with the code object: without guards, each one needs code of its own.
        run.__code__ = run.__code__.replace()
        compiled = torch.compile(
            run,
            backend="inductor",
            fullgraph=True,
            options={"guard_filter_fn": without_guards},
        )
        inputs = self._example(_EXAMPLE)
        for tensor, dim in zip(inputs, (1, 1, 0, 0), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        self._planned = Stub()
        with (
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.no_grad(),
            inductor_config.patch(self._options),
        ):
            warnings.simplefilter("ignore")  # the compiler uses what torch itself is about to remove
            compiled(*inputs)
        return compiled

    def _example(self, sizes: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
        num_positions, num_wanted, num_logits = sizes
        places = torch.arange(num_positions)
        wanted = places[num_positions - num_wanted :].clone()
        return ((places * 7 + 3) % self._vocab_size)[None], (places % 16)[None], wanted, torch.arange(num_logits)

    @torch.no_grad()
    def _check(self) -> float:
        """How far the compiled pass is off, 1.0 being all that is allowed."""
        yardstick = Yardstick(self._target, self._vocab_size, max(sizes[0] for sizes in _CHECKED))
        passes = []
        for num_positions, num_wanted, num_logits in _CHECKED:
            first = num_positions - num_wanted
            index = torch.arange(first, num_positions)
            found = self(*yardstick.example(num_positions), CausalAttention(), index, num_logits)
            passes.append((first, found))
        return yardstick.measure(passes)


def _caller(operator: Callable[..., torch.Tensor], layer: int) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        return operator(query, key, value, sinks, layer)

    return attend


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
