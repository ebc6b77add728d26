"""An engine for the HTTP tests: says what it was told to say, token by token, and remembers what happened to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from server.errors import Overloaded, ServingError
from server.messages import Delta, Ready, SpeculationRecord, Submit, TokenLogprob, TopLogprob

Script = Callable[[Submit], Sequence[int]]

RECORD = SpeculationRecord(
    num_steps=4,
    num_draft_tokens=20,
    num_accepted_tokens=6,
    histogram=(1, 1, 1, 1),
    num_prediction_drafted=9,
    num_prediction_accepted=4,
)


def ready(max_model_len: int = 1024, vocab_size: int = 300) -> Ready:
    return Ready(max_model_len, vocab_size, ("none", "trigram"), "cpu", "float32")


@dataclass
class FakeEngine:
    """Answers every request with `script(submit)`, `step` tokens at a time. Owns the lists of what was asked."""

    script: Script
    step: int = 1
    pause_s: float = 0.0
    refusal: ServingError | None = None
    fails_after: int | None = None
    failure: Exception | None = None
    failing: Callable[[Submit], bool] = lambda submit: True
    """Whose answers fail then."""
    num_places: int | None = None
    is_ready: bool = True
    has_worker: bool = True
    is_draining: bool = False
    is_drafting: bool = True
    is_dead: bool = False
    info: Ready | None = field(default_factory=ready)
    num_running: int = 0
    num_waiting: int = 0
    num_restarts: int = 0
    submits: list[Submit] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    async def stream(self, submit: Submit) -> AsyncIterator[Delta]:
        if self.refusal is not None:
            raise self.refusal
        if self.num_places is not None and self.num_running >= self.num_places:
            raise Overloaded("no place is left", retry_after_s=1.0)
        self.submits.append(submit)
        self.num_running += 1
        is_done = False
        try:
            tokens = list(self.script(submit))
            if submit.num_prompt_logprobs >= 0:
                # In two pieces, as a worker tells those of a long prompt.
                scored = logprobs(submit.prompt[1:], submit.num_prompt_logprobs, rank=2)
                for piece in (scored[:1], scored[1:]):
                    yield Delta(id=submit.id, tokens=(), prompt_logprobs=piece)
            stop_token, reason = None, "length"
            for position, token in enumerate(tokens):
                if token in submit.sampling.stop_ids:
                    tokens, stop_token, reason = tokens[: position + 1], token, "stop"
                    break
            if len(tokens) > submit.sampling.max_tokens:
                tokens, stop_token, reason = tokens[: submit.sampling.max_tokens], None, "length"
            for start in range(0, len(tokens), self.step):
                if self.fails_after is not None and start >= self.fails_after and self.failing(submit):
                    assert self.failure is not None
                    raise self.failure
                await asyncio.sleep(self.pause_s)
                part = tuple(tokens[start : start + self.step])
                is_last = start + self.step >= len(tokens)
                if is_last:
                    is_done = True
                yield Delta(
                    id=submit.id,
                    tokens=part,
                    logprobs=None if submit.sampling.num_logprobs < 0 else logprobs(part, submit.sampling.num_logprobs),
                    finish_reason=reason if is_last else None,
                    stop_token=stop_token if is_last else None,
                    num_cached_prompt=3 if start == 0 else None,
                    seated_for_s=0.0 if start == 0 else None,
                    record=RECORD if is_last or submit.speculation.wants_record else None,
                )
        finally:
            self.num_running -= 1
            (self.ended if is_done else self.aborted).append(submit.id)


def logprobs(tokens: Sequence[int], num_top: int, rank: int = 0) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(-0.25, tuple(TopLogprob(token + place, -0.25 - place) for place in range(num_top)), rank)
        for token in tokens
    )
