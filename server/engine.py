"""The gate: admits or refuses requests, gives each a stream, and lets no stream notice that a worker died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from server.config import Settings
from server.errors import AnswerLost, EngineUnavailable, Overloaded, RequestFailed, ServingError, StartupError
from server.messages import Abort, Delta, Outcome, Ready, StepStats, Submit, Vocabulary
from server.supervisor import Supervisor
from server.worker_process import WORKER_COMMAND, WorkerProcess

RETRY_OVERLOADED_S = 1.0
RETRY_UNAVAILABLE_S = 5.0


class _Stream:
    """One live request. Owns its undelivered events and the tokens a next worker must go on from."""

    __slots__ = ("_error", "_event", "_pending", "is_over", "is_started", "num_prompt_told", "submit", "tokens")

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.tokens: list[int] = list(submit.answer)
        self.is_over = False
        self.is_started = False
        self.num_prompt_told = submit.num_prompt_told
        self._pending: list[Delta] = []
        self._error: ServingError | None = None
        self._event = asyncio.Event()

    def push(self, delta: Delta) -> None:
        """The worker won tokens for this request."""
        self.tokens += delta.tokens
        self.is_over = delta.finish_reason is not None
        if self.is_started and delta.num_cached_prompt is not None:
            # A second worker's prefix cache is nothing the client was served from.
            delta = msgspec.structs.replace(delta, num_cached_prompt=None, seated_for_s=None)
        self.num_prompt_told += len(delta.prompt_logprobs or ())
        self.is_started |= bool(delta.tokens)
        self._pending.append(delta)
        self._event.set()

    def fail(self, error: ServingError) -> None:
        """The request ends with this error, after what was already won."""
        if not self.is_over:
            self.is_over = True
            self._error = error
            self._event.set()

    def resubmit(self) -> Submit:
        """The same request for another worker: the text goes on from the tokens already won."""
        return msgspec.structs.replace(self.submit, answer=tuple(self.tokens), num_prompt_told=self.num_prompt_told)

    async def next(self) -> Delta:
        """Everything that is new, as one delta. Raises: the error that ends the stream."""
        await self._event.wait()
        self._event.clear()
        if self._pending:
            if self._error is not None:
                self._event.set()
            deltas, self._pending = self._pending, []
            return deltas[0] if len(deltas) == 1 else _merge(deltas)
        assert self._error is not None, f"{self.submit.id}: woken for nothing"
        raise self._error


class Engine:
    """Streams of tokens from a worker process that may die and be replaced.

    All methods belong to one event loop. Owns the live streams and the supervisor.
    """

    def __init__(
        self,
        settings: Settings,
        on_stats: Callable[[StepStats], None] | None = None,
        on_ready: Callable[[Ready], None] | None = None,
        *,
        worker_command: Sequence[str] = WORKER_COMMAND,
        reserve: WorkerProcess | None = None,
    ) -> None:
        """`on_stats` hears of every step, `on_ready` of every worker that has loaded; `worker_command` starts another
        worker than ours, for tests."""
        self._max_live = settings.max_num_seqs + settings.max_queued
        self._on_stats, self._on_worker = on_stats, on_ready
        self._supervisor = Supervisor(settings, self, worker_command, reserve)
        self._streams: dict[str, _Stream] = {}
        self._is_ready = False
        self._is_draining = False
        self._reason_dead: str | None = None
        self._num_running = 0
        self._info: Ready | None = None
        self._told = asyncio.Event()  # ready for the first time, or dead
        self._is_over = asyncio.Event()  # dead
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._is_vocabulary_told = False
        self.vocabulary: Vocabulary | None = None
        """What a worker is told before its first grammar, once it is known."""

    # ---- how it is

    @property
    def is_ready(self) -> bool:
        """Whether requests are admitted now."""
        return self._is_ready and not self._is_draining and self._reason_dead is None

    @property
    def has_worker(self) -> bool:
        """Whether a worker has loaded and lives."""
        return self._is_ready

    @property
    def is_drafting(self) -> bool:
        """Whether the worker's drafters draft."""
        return self._is_ready and self._info is not None and self._info.is_awake

    @property
    def is_draining(self) -> bool:
        """Whether only the requests already here are finished."""
        return self._is_draining

    @property
    def is_dead(self) -> bool:
        """Whether there will be no worker any more."""
        return self._reason_dead is not None

    @property
    def info(self) -> Ready | None:
        """What the worker said when it was ready; None before that."""
        return self._info

    @property
    def num_running(self) -> int:
        """Requests that had a row after the last step."""
        return min(self._num_running, len(self._streams))

    @property
    def num_waiting(self) -> int:
        """Live requests that do not run."""
        return len(self._streams) - self.num_running

    @property
    def num_restarts(self) -> int:
        """Workers started in place of dead ones."""
        return self._supervisor.num_restarts

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker, while there is one."""
        return self._supervisor.pid

    # ---- its life

    async def start(self) -> None:
        """Start the worker process; it loads in the background (see `wait_ready`)."""
        self._supervisor.start()

    async def wait_ready(self) -> None:
        """Return when requests can be admitted. Raises: StartupError with one line if that will never be."""
        await self._told.wait()
        if self._reason_dead is not None:
            raise StartupError(self._reason_dead)

    async def wait_dead(self) -> str:
        """Return the reason once there will be no worker any more."""
        await self._is_over.wait()
        assert self._reason_dead is not None, "over for no reason"
        return self._reason_dead

    async def drain(self, timeout_s: float) -> bool:
        """Admit no more and wait until every live request has ended; False if the time did not suffice."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the worker. Streams that are still live get an error; no process, task or descriptor stays."""
        self._is_draining = True
        self._die("the server is shutting down")
        await self._supervisor.close()

    # ---- requests

    async def stream(self, submit: Submit) -> AsyncIterator[Delta]:
        """Run a request: its deltas, the last one with a finish reason. Closing the generator aborts it.

        Raises: before it is admitted EngineUnavailable (not ready, draining or dead) or Overloaded (queue full);
        after that RequestFailed (this request alone) or AnswerLost (the server ends or has given up).
        """
        stream = self._admit(submit)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self._forget(stream)

    def _admit(self, submit: Submit) -> _Stream:
        if self._reason_dead is not None:
            raise EngineUnavailable(self._reason_dead, retry_after_s=RETRY_UNAVAILABLE_S)
        if not self.is_ready:
            reason = "the server is shutting down" if self._is_draining else "the model is being loaded"
            raise EngineUnavailable(reason, retry_after_s=RETRY_UNAVAILABLE_S)
        if len(self._streams) >= self._max_live:
            raise Overloaded(
                f"{len(self._streams)} requests are running or waiting, the limit is {self._max_live}",
                retry_after_s=RETRY_OVERLOADED_S,
            )
        if self._supervisor.is_behind:
            raise Overloaded("the worker has not read yet what it was sent", retry_after_s=RETRY_OVERLOADED_S)
        assert submit.id not in self._streams, f"request id {submit.id} is taken"
        stream = self._streams[submit.id] = _Stream(submit)
        self._is_empty.clear()
        self._submit(submit)
        return stream

    def _submit(self, submit: Submit) -> None:
        """Send a request; before the first with a grammar, what the tokens mean."""
        if submit.constraint is not None and submit.constraint.grammar and not self._is_vocabulary_told:
            assert self.vocabulary is not None, f"{submit.id} has a grammar, and nobody knows the vocabulary"
            self._supervisor.send(self.vocabulary)
            self._is_vocabulary_told = True
        self._supervisor.send(submit)

    def _forget(self, stream: _Stream) -> None:
        del self._streams[stream.submit.id]
        if not stream.is_over:
            self._supervisor.send(Abort(stream.submit.id))
        if not self._streams:
            self._is_empty.set()

    # ---- what the supervisor tells

    def on_ready(self, ready: Ready) -> None:
        """A worker can serve: it takes over every live request where the last one left it."""
        self._info = ready
        self._is_ready = True
        self._is_vocabulary_told = False
        if self._on_worker is not None:
            self._on_worker(ready)
        for stream in self._streams.values():
            if not stream.is_over:
                self._submit(stream.resubmit())
        self._told.set()

    def on_awake(self) -> None:
        """The worker drafts from now on."""
        if self._info is not None:
            self._info = msgspec.structs.replace(self._info, is_awake=True)

    def on_outcome(self, outcome: Outcome) -> None:
        """Hand out what a step won. Events of requests that nobody waits for any more are dropped."""
        for delta in outcome.deltas:
            stream = self._streams.get(delta.id)
            if stream is not None:
                stream.push(delta)
        for error in outcome.errors:
            stream = self._streams.get(error.id)
            if stream is not None:
                stream.fail(RequestFailed(error.message))
        if outcome.stats is not None:
            self._num_running = outcome.stats.num_running
            if self._on_stats is not None:
                self._on_stats(outcome.stats)

    def on_down(self) -> None:
        """No admission until the next worker is ready; the live streams wait."""
        self._is_ready = False
        self._num_running = 0

    def on_given_up(self, reason: str) -> None:
        """Every stream ends with one error."""
        self._die(reason)

    def _die(self, reason: str) -> None:
        self._is_ready = False
        self._num_running = 0
        if self._reason_dead is None:
            self._reason_dead = reason
        for stream in self._streams.values():
            stream.fail(AnswerLost(reason, retry_after_s=RETRY_UNAVAILABLE_S))
        self._told.set()
        self._is_over.set()


def _merge(deltas: list[Delta]) -> Delta:
    """Several deltas of one request, in order, as one."""
    first, last = next((delta for delta in deltas if delta.tokens), deltas[0]), deltas[-1]
    logprobs = prompt_logprobs = None
    if first.logprobs is not None:
        logprobs = tuple(one for delta in deltas for one in delta.logprobs or ())
    if any(delta.prompt_logprobs for delta in deltas):
        prompt_logprobs = tuple(one for delta in deltas for one in delta.prompt_logprobs or ())
    return Delta(
        id=first.id,
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_token=last.stop_token,
        num_cached_prompt=first.num_cached_prompt,
        record=last.record,
        seated_for_s=first.seated_for_s,
        prompt_logprobs=prompt_logprobs,
    )
