"""A few trial requests before the worker calls itself ready: what is compiled on first use is compiled then.

The speculator gets its first costs here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from drafters import MASKS
from drafters.base import NOBODY
from server.errors import StartupError
from server.messages import Abort, Speculation, Submit
from server.worker.apart import is_device_lost
from server.worker.drafting import Effort
from server.worker.loop import Judge, Loop
from server.worker.profile import measure_steps
from server.worker.step_cost import DraftSample, Profile, StepCost
from verifier.plan import MAX_TREE_NODES, SamplingParams

logger = logging.getLogger(__name__)

_PROMPT_LEN = 8
_MAX_TOKENS = 8
_DRAFTED_NODES = 16
_DRAFTED_ROWS = (1, 8)

_TRIALS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "stop_ids": (0,),
        "num_logprobs": 1,
    },
)


def warm_up(loop: Loop, vocab_size: int) -> None:
    """Run every loaded drafter with every kind of sampling. Raises: StartupError if the model fails on it."""
    for trial in _TRIALS:
        _try(loop, vocab_size, loop.drafting.names, MAX_TREE_NODES, trial, [])


def begin(loop: Loop, judge: Judge, vocab_size: int) -> None:
    """Measure what steps and drafting cost, and let the speculator of a warm loop begin. Raises: StartupError."""
    scheduler, speculator = loop.scheduler, loop.speculator
    steps = measure_steps(judge, scheduler.roster, vocab_size)
    if not steps:
        return
    drafts = []
    for effort in (Effort.CHEAP, Effort.FULL):
        for num_rows in _DRAFTED_ROWS:
            num_rows = min(num_rows, scheduler.limits.max_rows)
            seconds = _drafting_s(loop, vocab_size, effort, num_rows)
            if seconds:
                drafts.append(DraftSample(effort, num_rows, seconds))
    speculator.begin(StepCost(Profile(tuple(steps), tuple(drafts)), scheduler.limits.max_batched_tokens))


def _drafting_s(loop: Loop, vocab_size: int, effort: Effort, num_rows: int) -> float:
    """The least that drafting for so many rows took in a step, reading what came of it included; 0 without drafters."""
    names = loop.drafting.names[1:]
    if not names:
        return 0.0
    name = max(names, key=lambda name: MASKS.get(name, 0))  # the one with most sources: of these the head costs most
    took: list[float] = []
    loop.speculator.trial_effort = effort
    try:
        _try(loop, vocab_size, [name] * num_rows, _DRAFTED_NODES, {"temperature": 0.0}, took)
    finally:
        loop.speculator.trial_effort = None
    return min(took, default=0.0)


class Preparable(Judge, Protocol):
    """A judge whose steps get quicker while it is not needed: see verifier.runner.Verifier."""

    @property
    def num_recorded(self) -> int:
        """How many step sizes are recorded."""

    def prepare_more(self, is_idle: bool) -> bool:
        """Record one more, between steps. Returns: whether to call again when idle."""


class Preparation:
    """Makes later steps quicker while nobody waits, and measures again what steps cost when that is done.

    Owns how much was recorded when they were measured.
    """

    def __init__(self, judge: Preparable, loop: Loop, vocab_size: int) -> None:
        """Steps have just been measured, if they are at all."""
        self._judge, self._loop, self._vocab_size = judge, loop, vocab_size
        self._num_measured = judge.num_recorded

    def __call__(self, is_idle: bool) -> bool:
        """Do a piece of work, for a moment, between steps. Returns: whether to call again when idle."""
        has_more, num_recorded = self._judge.prepare_more(is_idle), self._judge.num_recorded
        if is_idle and not has_more and num_recorded != self._num_measured:
            self._num_measured = num_recorded
            if self._loop.speculator.cost is not None:
                self._measure()
        return has_more

    def _measure(self) -> None:
        """Measure again; a request that comes meanwhile waits for it. What fails leaves the costs as they were."""
        try:
            begin(self._loop, self._judge, self._vocab_size)
        except Exception as error:
            if is_device_lost(error):
                raise
            logger.warning("steps are not measured again: %s", error)


def _try(
    loop: Loop, vocab_size: int, names: Sequence[str], max_nodes: int, trial: Mapping[str, Any], took: list[float]
) -> None:
    """Run a request for each of these drafters to its end. `took` gets what drafting took in each step but the first,
    in which all rows read their prompts."""
    context_len = loop.scheduler.limits.context_len
    prompt = tuple(index % vocab_size for index in range(1, min(_PROMPT_LEN, context_len - 1) + 1))
    sampling = SamplingParams(max_tokens=_MAX_TOKENS, seed=1, **trial)
    for index, name in enumerate(names):
        loop.handle(Submit(f"warm-up {index} {name}", prompt, sampling, Speculation(name, max_nodes), NOBODY))
    is_first = True
    while loop.has_work:
        for error in loop.step().errors:
            for index, name in enumerate(names):
                loop.handle(Abort(f"warm-up {index} {name}"))
            raise StartupError(f"the model failed on a trial request: {error.message}", is_final=False)
        if not is_first and loop.speculator.effort is not Effort.NONE:
            took.append(sum(loop.drafting.spent_s.values()))
        is_first = False
