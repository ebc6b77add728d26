"""The forward pass without the framework's bookkeeping: traced once, then run operation by operation.

A small model's step is mostly module calls, attribute look-ups and wrappers of Python. Dynamo records the very same
operations that transformers would run, with the attention as one opaque call, and replays them; nothing is fused or
reordered, so the numbers are equal to the last bit. That is checked when it is recorded, and whatever cannot be
recorded, or differs, runs as transformers wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from verifier.model import CAPTURED_ATTRIBUTE, Attender, AttentionInputs, forward

_Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)


class CapturedForward:
    """Runs steps in which every position has logits, captured where possible.

    Recorded twice: for one position, which the tracer treats as a constant, and for any number of them. Owns both
    recordings and the seat from which their attention takes the step's plan.
    """

    def __init__(self, network: torch.nn.Module, modules: Sequence[torch.nn.Module]) -> None:
        """`modules` are the attention modules of the network."""
        self._network = network
        self._planned: Attender | None = None
        self._runs: dict[bool, _Run | None] = {}
        for module in modules:
            setattr(module, CAPTURED_ATTRIBUTE, self._make_attend(module))

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, planned: Attender) -> torch.Tensor:
        """Logits [N, V] of input_ids and position_ids [1, N] int64."""
        is_one = input_ids.shape[1] == 1
        if is_one not in self._runs:
            self._runs[is_one] = self._record(input_ids, position_ids, planned)
        run = self._runs[is_one]
        if run is None:
            return forward(self._network, input_ids, position_ids, None, planned)
        self._planned = planned
        return run(input_ids, position_ids)

    def _make_attend(self, module: torch.nn.Module) -> Callable[..., torch.Tensor]:
        """The opaque call of one attention module."""

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
        ) -> torch.Tensor:
            if isinstance(query, torch._subclasses.fake_tensor.FakeTensor):  # while it is recorded
                return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
            assert self._planned is not None, "a captured attention outside of a step"
            return self._planned.attend(AttentionInputs(module, query, key, value, None, None, None, sinks))

        return torch._dynamo.allow_in_graph(attend)  # type: ignore[no-untyped-call, no-any-return]

    def _record(self, input_ids: torch.Tensor, position_ids: torch.Tensor, planned: Attender) -> _Run | None:
        """Record the forward pass for inputs like these; None if that fails or changes a bit."""
        expected = forward(self._network, input_ids, position_ids, None, planned)

        def run(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return forward(self._network, input_ids, position_ids, None, None)

        # Dynamo keeps its recordings with the code object: without guards, each one needs code of its own.
        run.__code__ = run.__code__.replace()
        # Guards would ask at every call whether weights or modes have changed; here they never do, and the number
        # of positions, which does, is marked: the tracer fails rather than fix it.
        captured: _Run = torch.compile(
            run, backend="eager", fullgraph=True, options={"guard_filter_fn": _without_guards}
        )
        self._planned = planned
        # Marks stay on a tensor: these are views of their own.
        inputs = [tensor.view(tensor.shape) for tensor in (input_ids, position_ids)]
        if input_ids.shape[1] > 1:
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 1)
        try:
            actual = captured(*inputs)
        except Exception as error:
            # The tracer raises what it likes about code it cannot record; the model then runs as it is.
            logger.info("the forward pass is not captured: %s", str(error).partition("\n")[0])
            return None
        if not torch.equal(actual, expected):
            logger.info("the forward pass is not captured: its numbers would change")
            return None
        return captured


def _without_guards(guards: Sequence[Any]) -> list[bool]:
    return [False] * len(guards)
