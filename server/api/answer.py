"""The answer to one request: its choices run side by side, and come out as pieces of text in the order they are won."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import msgspec

from server.api.order import Order, check_vocabulary
from server.api.prompt_scores import PromptScores
from server.api.service import Gate, Service
from server.detokenize import Detokenizer
from server.errors import AnswerLost, EngineUnavailable, Overloaded, RequestFailed, ServingError
from server.messages import Delta, SpeculationRecord, Submit, TokenLogprob
from server.metrics import Metrics, RequestRecord

ADMISSION_WAIT_S = 0.02
"""How long a stream waits for its first piece before it says 200: a refusal comes at once and can still be a status."""


REFUSED = "refused"
"""How a choice ends that the engine did not admit: it was no answer, and is not counted as one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to answer. `is_continued`: the answer goes on with the prompt's text, it is not a text of its own."""

    ids: tuple[int, ...]
    is_continued: bool
    prediction: tuple[int, ...] | None = None
    """What the client expects the answer to be, if it said so."""
    echo: str | None = None
    """The text to show before the answer, with the log-probabilities of its tokens; an echo without these is the
    writer's."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One token with its log-probability. `offset` counts characters of the answer before it."""

    token: int
    logprob: TokenLogprob | None
    """None for the first token of a prompt: nothing stands before it."""
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one choice that can be sent. With `finish_reason` it is the choice's last."""

    index: int
    text: str
    entries: tuple[Entry, ...] | None
    finish_reason: str | None
    num_tokens: int
    """Answer tokens of this choice so far."""
    tokens: tuple[int, ...] = ()
    """Those that are new, if token ids are to be told."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What became of the draft tokens that were copied from the prediction, over all choices."""

    num_accepted: int
    num_rejected: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole request: every prompt once, every choice's answer."""

    num_prompt: int
    num_answer: int
    num_cached: int
    predicted: Predicted | None = None
    """Only when the request carried a prediction."""


class Choice:
    """One answer under way. Owns its detokenizer, its counts, its clock and what is known of its prompt."""

    def __init__(self, index: int, submit: Submit, detokenizer: Detokenizer, order: Order, scores: PromptScores):
        self.index = index
        self.submit = submit
        self.scores = scores
        self.token_ids: list[int] = []
        """The answer so far, if token ids are to be told."""
        self.num_cached = 0
        self.record: SpeculationRecord | None = None
        self.ending_if_cut = "abort"  # how it counts when it is cancelled: the client went away
        self._detokenizer = detokenizer
        self._order = order
        self._arrived_s = time.monotonic()
        self._first_s: float | None = None
        self._prefill_s: float | None = None
        self._last_s = 0.0  # when the last tokens came, once some have
        self._finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Answer tokens so far, up to the one that completed a stop string."""
        return self._detokenizer.num_tokens

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._detokenizer.stopped_by

    async def run(self, engine: Gate, metrics: Metrics, out: asyncio.Queue[Piece | Exception | None]) -> None:
        """Put pieces into `out`, then None; a failure goes there too. Cancelling aborts the request."""
        stream = engine.stream(self.submit)
        ending: str | None = None
        try:
            async for delta in stream:
                self._clock(delta, metrics)
                piece = self._read(delta)
                if piece is not None:
                    out.put_nowait(piece)
                    if piece.finish_reason is not None:
                        ending = piece.finish_reason
                        break
            else:
                raise RequestFailed("The answer ended without a reason.")
        except Exception as error:  # handed to the one who reads `out`, who tells it to the client
            ending = _ending(error)
            out.put_nowait(error)
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
            ending = ending or self.ending_if_cut
            if ending != REFUSED:
                metrics.request_ended(self._measure(ending))
        out.put_nowait(None)

    def _clock(self, delta: Delta, metrics: Metrics) -> None:
        """Note when tokens come."""
        if not delta.tokens:
            return
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
            self._prefill_s = seated_s = delta.seated_for_s
            queue_s = None if seated_s is None else max(0.0, now - seated_s - self._arrived_s)
            metrics.first_token_came(now - self._arrived_s, queue_s)
        else:
            metrics.tokens_came(now - self._last_s, len(delta.tokens))
        self._last_s = now

    def _read(self, delta: Delta) -> Piece | None:
        if delta.num_cached_prompt is not None:
            self.num_cached = delta.num_cached_prompt
        if delta.record is not None:
            self.record = delta.record
        if delta.prompt_logprobs is not None:
            self.scores.add(delta.prompt_logprobs)
        if not self._order.has_answer:
            delta = _without_answer(delta)
        num_before, tokens = self._detokenizer.num_tokens, delta.tokens
        num_hidden = 1 if delta.stop_token is not None and not self._order.keeps_stop else 0
        shown = tokens[: len(tokens) - num_hidden] if num_hidden else tokens
        entries: tuple[Entry, ...] | None = None
        if delta.logprobs is None:
            text = self._detokenizer.feed(shown)
        else:
            text, entries = self._feed_with_logprobs(shown, delta.logprobs)
            if num_hidden and self._order.telling.num_echo_logprobs >= 0 and not self._detokenizer.is_stopped:
                # Evaluation tools cut one entry off the end: the stop token, if nothing else was won, has one too.
                place = self.scores.num_echoed + self._detokenizer.length
                entries = (*entries, Entry(tokens[-1], delta.logprobs[-1], place))
        reason = delta.finish_reason
        if reason is not None and not self._detokenizer.is_stopped:
            self._detokenizer.count(num_hidden)
            text += self._detokenizer.finish()
        if self._detokenizer.is_stopped:
            reason = "stop"
        if (tokens or reason) and (echo := self.scores.take_echo()) is not None:
            text = echo + text
            entries = (*(Entry(*one) for one in self.scores.echoed()), *(entries or ()))
        num_tokens = self._detokenizer.num_tokens
        told = tokens[: num_tokens - num_before] if self._order.telling.has_token_ids else ()
        self.token_ids += told
        if not (text or reason or entries or told):
            return None
        return Piece(self.index, text, entries, reason, num_tokens, told)

    def _feed_with_logprobs(
        self, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> tuple[str, tuple[Entry, ...]]:
        texts: list[str] = []
        entries: list[Entry] = []
        for token, logprob in zip(tokens, logprobs, strict=False):
            if self._detokenizer.is_stopped:
                break
            entries.append(Entry(token, logprob, self.scores.num_echoed + self._detokenizer.length))
            texts.append(self._detokenizer.feed((token,)))
        return "".join(texts), tuple(entries)

    def _measure(self, ending: str) -> RequestRecord:
        now = time.monotonic()
        num_tokens, first_s = self.num_tokens, self._first_s
        return RequestRecord(
            finish_reason=ending,
            num_prompt=len(self.submit.prompt),
            num_generated=num_tokens,
            tpot_s=None if first_s is None or num_tokens < 2 else (now - first_s) / (num_tokens - 1),
            e2e_s=now - self._arrived_s,
            max_tokens=self.submit.sampling.max_tokens,
            num_cached=self.num_cached,
            prefill_s=self._prefill_s,
            decode_s=None if first_s is None else self._last_s - first_s,
            speculation=self.record,
        )


class Answer:
    """All choices of one request. Owns one task per choice, until `close`."""

    def __init__(self, id_: str, order: Order, prompts: list[Prompt], tenant: str, service: Service):
        self.id = id_
        self.order = order
        self.prompts = prompts
        self.choices = list(_choices(id_, order, prompts, tenant, service))
        self._service = service
        self._pieces: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._backlog: deque[Piece | Exception | None] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: Exception | None = None  # of the choice that failed first

    async def open(self) -> None:
        """Start every choice. Raises what the engine refuses at once, after closing all of them."""
        engine, metrics = self._service.engine, self._service.metrics
        self._tasks = [asyncio.create_task(choice.run(engine, metrics, self._pieces)) for choice in self.choices]
        try:
            async with asyncio.timeout(ADMISSION_WAIT_S):
                self._backlog.append(await self._pieces.get())
        except TimeoutError:
            return
        except asyncio.CancelledError:
            await self.close()
            raise
        while not self._pieces.empty():
            self._backlog.append(self._pieces.get_nowait())
        failure = next((item for item in self._backlog if isinstance(item, Exception)), None)
        if failure is not None:
            self._failure = failure
            await self.close()
            raise failure

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every piece as it comes, until all choices have ended. Raises the first failure."""
        num_running = len(self.choices)
        while num_running:
            item = self._backlog.popleft() if self._backlog else await self._pieces.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                self._failure = item
                raise item
            else:
                yield self._with_waiting(item)

    def _with_waiting(self, piece: Piece) -> Piece:
        """`piece` and those of the same choice that already wait behind it, as one: a slow client gets fewer chunks."""
        while not self._backlog and not self._pieces.empty():
            item = self._pieces.get_nowait()
            if not isinstance(item, Piece) or item.index != piece.index or item.entries or piece.entries:
                self._backlog.append(item)
                break
            text, tokens = piece.text + item.text, piece.tokens + item.tokens
            piece = Piece(piece.index, text, None, item.finish_reason, item.num_tokens, tokens)
        return piece

    async def close(self) -> None:
        """Abort what still runs; nothing is left behind. Where one choice failed, the others count as it does."""
        if self._failure is not None:
            for choice in self.choices:
                choice.ending_if_cut = _ending(self._failure)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks and (self._failure is None or _ending(self._failure) != REFUSED):
            for group in self._groups():
                self._service.metrics.prompt_ended(len(group), max(choice.num_tokens for choice in group))
        self._tasks = []

    def _groups(self) -> list[list[Choice]]:
        """The choices, prompt by prompt."""
        n = self.order.n
        return [self.choices[start : start + n] for start in range(0, len(self.choices), n)]

    def usage(self) -> Usage:
        """Counts so far."""
        return Usage(
            num_prompt=sum(len(prompt.ids) for prompt in self.prompts),
            num_answer=sum(choice.num_tokens for choice in self.choices),
            num_cached=sum(max(choice.num_cached for choice in group) for group in self._groups()),
            predicted=self._predicted(),
        )

    def _predicted(self) -> Predicted | None:
        if all(prompt.prediction is None for prompt in self.prompts):
            return None
        records = [choice.record for choice in self.choices if choice.record is not None]
        num_accepted = sum(record.num_prediction_accepted for record in records)
        return Predicted(num_accepted, sum(record.num_prediction_drafted for record in records) - num_accepted)

    def record(self) -> SpeculationRecord | None:
        """What speculation did, for a request of one choice that has ended."""
        return self.choices[0].record


def _choices(id_: str, order: Order, prompts: list[Prompt], tenant: str, service: Service) -> Iterator[Choice]:
    worker, telling, text = service.worker(), order.telling, service.scribe.text
    marks = order.marks | text.special_names if telling.shows_special else order.marks
    for prompt_index, prompt in enumerate(prompts):
        check_vocabulary(prompt.ids, worker.vocab_size)
        speculation = order.speculation
        if prompt.prediction is not None or order.stop:
            # A stop string may end the text before the worker tells its last counts.
            speculation = msgspec.structs.replace(speculation, wants_record=True)
        for choice_index in range(order.n):
            index = prompt_index * order.n + choice_index
            sampling = order.sampling_for(choice_index, len(prompt.ids), worker.max_model_len)
            submit = Submit(
                id=f"{id_}-{index}",
                prompt=prompt.ids,
                sampling=sampling,
                speculation=speculation,
                tenant=tenant,
                prediction=prompt.prediction or (),
                constraint=order.constraint,
                num_prompt_logprobs=telling.num_scored,
            )
            detokenizer = Detokenizer(
                text.reader(prompt.ids if prompt.is_continued else (), marks),
                order.stop,
                keeps_stop=order.keeps_stop,
                min_tokens=sampling.min_tokens,
            )
            scores = PromptScores(prompt.ids, prompt.echo, text.reader(marks=marks))
            yield Choice(index, submit, detokenizer, order, scores)


def _without_answer(delta: Delta) -> Delta:
    """The same, but the token that the engine had to win was not asked for."""
    reason = None if delta.finish_reason is None else "length"
    logprobs = None if delta.logprobs is None else ()
    return msgspec.structs.replace(delta, tokens=(), logprobs=logprobs, stop_token=None, finish_reason=reason)


def _ending(error: Exception) -> str:
    """How a choice that ends by this error is counted: whatever was admitted has failed."""
    is_refusal = isinstance(error, Overloaded | EngineUnavailable) and not isinstance(error, AnswerLost)
    return REFUSED if is_refusal else "error"


def as_serving_error(error: Exception) -> ServingError:
    """The error to tell a client whose answer has begun."""
    return error if isinstance(error, ServingError) else RequestFailed("Something went wrong on our side.")
