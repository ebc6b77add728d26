"""The state of one request on its way through the worker."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from server.messages import SpeculationRecord, Submit
from server.worker.pages import page_digest, tenant_digest
from verifier.verdict import TokenLogprobs

if TYPE_CHECKING:
    from server.worker.constraint import RowConstraint


class Status(Enum):
    """Where a sequence stands."""

    WAITING = 1
    PREFILLING = 2
    GENERATING = 3
    FINISHED = 4


class Sequence:
    """One request: its tokens, its seat, its pages, its counters.

    While it generates, all tokens but the last have K/V in the cache (num_cached == len(tokens) - 1); the last
    one is the root of the next tree. Owns all of its fields; the scheduler changes seat and pages, `commit`
    the rest.
    """

    __slots__ = (
        "arrival",
        "constraint",
        "digests",
        "drafter",
        "finish_reason",
        "histogram",
        "id",
        "is_prompt_told",
        "max_len",
        "max_nodes",
        "num_accepted",
        "num_cached",
        "num_cached_prompt",
        "num_drafted",
        "num_prediction_accepted",
        "num_prediction_drafted",
        "num_prompt",
        "num_prompt_logprobs",
        "num_prompt_told",
        "num_published",
        "pages",
        "prediction",
        "root_digest",
        "row",
        "sampling",
        "seated_s",
        "status",
        "stop_ids",
        "stop_token",
        "tenant",
        "tokens",
        "wants_record",
    )

    def __init__(
        self, submit: Submit, arrival: int, max_model_len: int, constraint: RowConstraint | None = None
    ) -> None:
        self.id = submit.id
        self.constraint = constraint
        self.arrival = arrival
        self.tokens = [*submit.prompt, *submit.answer]
        self.num_prompt = len(submit.prompt)
        self.num_prompt_logprobs = submit.num_prompt_logprobs
        self.num_prompt_told = submit.num_prompt_told
        self.sampling = submit.sampling
        self.stop_ids = frozenset(submit.sampling.stop_ids)
        self.max_len = min(self.num_prompt + submit.sampling.max_tokens, max_model_len)
        self.tenant = submit.tenant
        self.max_nodes = submit.speculation.max_nodes if submit.speculation.drafter != "none" else 1
        self.drafter = submit.speculation.drafter if self.max_nodes > 1 else "none"
        self.prediction = submit.prediction
        self.wants_record = submit.speculation.wants_record
        self.status = Status.WAITING
        self.row = -1
        self.seated_s: float | None = None  # perf_counter() when it was first given a row
        self.pages: list[int] = []
        self.num_cached = 0
        self.num_published = 0
        self.root_digest = tenant_digest(submit.tenant)
        self.digests: list[bytes] = []
        self.num_cached_prompt: int | None = None
        self.is_prompt_told = False
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_prediction_drafted = 0
        self.num_prediction_accepted = 0
        self.histogram: list[int] = []
        self.finish_reason: str | None = None
        self.stop_token: int | None = None

    @property
    def num_left(self) -> int:
        """Tokens that can still be won before a length limit ends the answer."""
        return self.max_len - len(self.tokens)

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told: then all of it has to run."""
        return self.num_prompt_logprobs >= 0 and self.num_prompt_told < self.num_prompt - 1

    def targets(self, start: int, stop: int) -> tuple[int, ...]:
        """The prompt's tokens that follow the positions from `start` and before `stop`, while they are to be told."""
        return tuple(self.tokens[start + 1 : min(stop + 1, self.num_prompt)]) if self.is_scored else ()

    def take_scores(self, start: int, scores: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those of the scores of the tokens behind `start` that were not told before; they are now."""
        new = scores[max(0, self.num_prompt_told - start) :]
        self.num_prompt_told += len(new)
        return new

    def page_digests(self, count: int, page_size: int) -> list[bytes]:
        """Digests of the first `count` full pages, chained; computed once and kept."""
        digests = self.digests
        parent = digests[-1] if digests else self.root_digest
        for index in range(len(digests), count):
            parent = page_digest(parent, self.tokens[index * page_size : (index + 1) * page_size])
            digests.append(parent)
        return digests[:count]

    def commit(self, won: list[int]) -> int:
        """Append tokens the verifier proved; returns how many of them count.

        The answer ends at the first stop id or at a length limit; tokens after the end never happened.
        """
        assert self.status is Status.GENERATING, f"{self.id}: tokens won while {self.status.name}"
        kept = won[: self.num_left]
        if not self.stop_ids.isdisjoint(kept):
            first = next(index for index, token in enumerate(kept) if token in self.stop_ids)
            kept = kept[: first + 1]
            self.finish_reason, self.stop_token = "stop", kept[-1]
        self.tokens += kept
        if self.finish_reason is None and self.num_left == 0:
            self.finish_reason = "length"
        if self.finish_reason is None and self.constraint is not None:
            self.constraint.advance(kept)
        self.num_cached = len(self.tokens) - 1
        return len(kept)

    def count_drafts(self, num_drafted: int, num_accepted: int) -> None:
        """Note one verify step that carried `num_drafted` draft tokens, for the request's record."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        while len(self.histogram) <= num_accepted:
            self.histogram.append(0)
        self.histogram[num_accepted] += 1

    def count_prediction(self, num_drafted: int, num_accepted: int) -> None:
        """Note how many draft tokens of a step were copied from the prediction, and how many of them counted."""
        self.num_prediction_drafted += num_drafted
        self.num_prediction_accepted += num_accepted

    def record(self) -> SpeculationRecord:
        """What speculation did for this request, since it was submitted to this worker."""
        return SpeculationRecord(
            num_steps=sum(self.histogram),
            num_draft_tokens=self.num_drafted,
            num_accepted_tokens=self.num_accepted,
            histogram=tuple(self.histogram),
            num_prediction_drafted=self.num_prediction_drafted,
            num_prediction_accepted=self.num_prediction_accepted,
        )
