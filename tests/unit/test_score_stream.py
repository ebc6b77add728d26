"""Scores of a prompt on their way through the engine, also from one worker to the next."""

from __future__ import annotations

import asyncio

from server.engine import _Stream
from server.messages import Delta, Speculation, Submit, TokenLogprob
from verifier.plan import SamplingParams

SUBMIT = Submit(
    "a", (1, 2, 3, 4), SamplingParams(max_tokens=3, seed=1), Speculation("none", 1), "t", num_prompt_logprobs=0
)


def scores(*values: float) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(value, (), 1) for value in values)


def test_scores_and_tokens_that_wait_are_one_delta() -> None:
    stream = _Stream(SUBMIT)
    stream.push(Delta("a", (), prompt_logprobs=scores(-1, -2)))
    stream.push(Delta("a", (), prompt_logprobs=scores(-3)))
    first = Delta("a", (7,), logprobs=scores(-4), num_cached_prompt=0, seated_for_s=0.5)
    stream.push(first)
    stream.push(Delta("a", (8,), logprobs=scores(-5), finish_reason="length"))
    merged = asyncio.run(stream.next())
    assert merged == Delta(
        "a", (7, 8), scores(-4, -5), "length", num_cached_prompt=0, seated_for_s=0.5,
        prompt_logprobs=scores(-1, -2, -3),
    )  # fmt: skip


def test_the_next_worker_hears_how_much_was_told() -> None:
    stream = _Stream(SUBMIT)
    stream.push(Delta("a", (), prompt_logprobs=scores(-1, -2)))
    again = stream.resubmit()
    assert (again.num_prompt_told, again.answer) == (2, ())
    stream.push(Delta("a", (), prompt_logprobs=scores(-3)))
    stream.push(Delta("a", (7,), num_cached_prompt=0))
    assert (stream.resubmit().num_prompt_told, stream.resubmit().answer) == (3, (7,))
    merged = asyncio.run(stream.next())
    assert merged.num_cached_prompt == 0, "the first worker's count came with the first tokens"
    assert _Stream(again).resubmit() == again, "and a third worker, if the second dies at once"
