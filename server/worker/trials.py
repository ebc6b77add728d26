"""Trial requests: whether the model answers at all, and what steps and drafting cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drafters import MASKS, PLAIN
from drafters.base import NOBODY
from server.errors import StartupError
from server.messages import Abort, Speculation, Submit
from server.worker.drafting import Effort
from server.worker.loop import Judge, Loop
from server.worker.profile import Turns, measure_steps
from server.worker.step_cost import DraftSample, Profile, StepCost
from verifier.plan import MAX_TREE_NODES, SamplingParams

_PROMPT_LEN = 8
_MAX_TOKENS = 8
_DRAFTED_NODES = 16
_DRAFTED_ROWS = (1, 8)

TRIALS: tuple[dict[str, Any], ...] = (
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
"""Every kind of sampling."""


def try_target(loop: Loop, vocab_size: int) -> None:
    """Answer one plain request with a token. Raises: StartupError if the model fails on it."""
    _try(loop, vocab_size, [PLAIN], 1, {**TRIALS[0], "max_tokens": 1}, [])


def try_all(loop: Loop, vocab_size: int) -> None:
    """Run every loaded drafter with every kind of sampling: what a device compiles on first use is compiled then.

    Raises: StartupError if the model fails on it.
    """
    for trial in TRIALS:
        _try(loop, vocab_size, loop.drafting.names, MAX_TREE_NODES, trial, [])


def measure(loop: Loop, judge: Judge, vocab_size: int, step_sizes: Sequence[int] = ()) -> Turns[Profile | None]:
    """Measure what steps and drafting cost, and let the speculator begin; None where not even one trial step fits.

    Nobody may be running during a turn. Raises: StartupError.
    """
    scheduler, speculator = loop.scheduler, loop.speculator
    steps = yield from measure_steps(judge, scheduler.roster, vocab_size)
    if not steps:
        return None
    drafts = []
    for effort in (Effort.CHEAP, Effort.FULL):
        for num_rows in _DRAFTED_ROWS:
            yield
            num_rows = min(num_rows, scheduler.limits.max_rows)
            seconds = _drafting_s(loop, vocab_size, effort, num_rows)
            if seconds:
                drafts.append(DraftSample(effort, num_rows, seconds))
    profile = Profile(tuple(steps), tuple(drafts))
    speculator.begin(StepCost(profile, scheduler.limits.max_batched_tokens, step_sizes))
    return profile


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


def _try(
    loop: Loop, vocab_size: int, names: Sequence[str], max_nodes: int, trial: Mapping[str, Any], took: list[float]
) -> None:
    """Run a request for each of these drafters to its end. `took` gets what drafting took in each step but the first,
    in which all rows read their prompts."""
    context_len = loop.scheduler.limits.context_len
    prompt = tuple(index % vocab_size for index in range(1, min(_PROMPT_LEN, context_len - 1) + 1))
    sampling = SamplingParams(**{"max_tokens": _MAX_TOKENS, "seed": 1, **trial})
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
