"""The forward pass without the framework's bookkeeping: traced once, then run operation by operation.

A small model's step is mostly module calls, attribute look-ups and wrappers of Python. Dynamo records the very same
operations that transformers would run, with the attention as one opaque call, and replays them; nothing is fused or
reordered, so the numbers are equal to the last bit. That is checked at several sizes when it is recorded, and whatever
cannot be recorded, differs, or is larger than what was checked, runs as transformers wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from verifier.model import CAPTURED_ATTRIBUTE, Attender, AttentionInputs, Pass, Target

MAX_POSITIONS = 256
"""Larger steps are not captured: their time is in the operations, not between them."""

_RECORDED_AT = 5
_CHECKED_AT = (2, 3, 17, 64, MAX_POSITIONS)
"""A branch on the number of positions is recorded one way only: it shows at one of the ends."""

_Run = Callable[[torch.Tensor, torch.Tensor], Pass]

logger = logging.getLogger(__name__)


class CapturedForward:
    """Runs steps in which every position has logits, captured where possible.

    Recorded twice, on first use: for one position, which the tracer treats as a constant, and for any number of them.
    Owns both recordings and the seat from which their attention takes the step's plan.
    """

    def __init__(self, target: Target, modules: Sequence[torch.nn.Module], vocab_size: int) -> None:
        """`modules` are the attention modules of the network."""
        self._target = target
        self._vocab_size = vocab_size
        self._planned: Attender | None = None
        self._runs: dict[bool, _Run | None] = {}
        for module in modules:
            setattr(module, CAPTURED_ATTRIBUTE, self._make_attend(module))

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, planned: Attender) -> Pass:
        """Logits [N, V] and states [N, H] of input_ids and position_ids [1, N] int64."""
        num_positions = input_ids.shape[1]
        run = self.recording(num_positions == 1, input_ids.device) if num_positions <= MAX_POSITIONS else None
        if run is None:
            return self._target(input_ids, position_ids, planned)
        self._planned = planned
        return run(input_ids, position_ids)

    def recording(self, is_one: bool, device: torch.device) -> _Run | None:
        """The recording for one position, or for several; None if there can be none."""
        if is_one not in self._runs:
            sizes = (1,) if is_one else (_RECORDED_AT, *_CHECKED_AT)
            self._runs[is_one] = self._record([self._example(size, device) for size in sizes])
        return self._runs[is_one]

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

    def _example(self, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions [1, size] to record or to check with."""
        places = torch.arange(size, device=device)[None]
        return (places * 7 + 3) % self._vocab_size, places % 16

    @torch.inference_mode()
    def _record(self, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Run | None:
        """Record the pass with the first example and compare it with all; None if that fails or changes a bit."""

        def run(input_ids: torch.Tensor, position_ids: torch.Tensor) -> Pass:
            return self._target(input_ids, position_ids, None)

        # Dynamo keeps its recordings with the code object: without guards, each one needs code of its own.
        run.__code__ = run.__code__.replace()
        # Guards would ask at every call whether weights or modes have changed; here they never do, and the number
        # of positions, which does, is marked: the tracer fails rather than fix it.
        captured: _Run = torch.compile(
            run, backend="eager", fullgraph=True, options={"guard_filter_fn": without_guards}
        )
        self._planned = Stub()
        first = [tensor.clone() for tensor in examples[0]]  # a mark stays on its tensor
        if first[0].shape[1] > 1:
            for tensor in first:
                torch._dynamo.mark_dynamic(tensor, 1)
        try:
            captured(first[0], first[1])
            is_equal = all(_is_equal(captured(*example), self._target(*example, self._planned)) for example in examples)
        except Exception as error:
            # The tracer raises what it likes about code it cannot record; the model then runs as it is.
            logger.info("the forward pass is not captured: %s", str(error).partition("\n")[0])
            return None
        finally:
            self._planned = None
        if not is_equal:
            logger.info("the forward pass is not captured: its numbers would change")
            return None
        return captured


class Stub:
    """Stands in for attention while a recording is made and checked: touches no K/V, depends on all its inputs."""

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """[1, heads, N, k_dim] queries -> [1, N, heads, v_dim]."""
        query, key, value = inputs.query, inputs.key, inputs.value
        weights = query.mean(dim=3, keepdim=True) + key.mean(dim=(1, 3))[:, None, :, None]
        spread = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (spread * weights).transpose(1, 2)


def _is_equal(one: Pass, other: Pass) -> bool:
    """Equal to the last bit, logits and states."""
    (logits, states), (expected, read) = one, other
    if states is None or read is None:
        return states is read and torch.equal(logits, expected)
    return torch.equal(logits, expected) and torch.equal(states, read)


def without_guards(guards: Sequence[Any]) -> list[bool]:
    """Keeps no guard."""
    return [False] * len(guards)
