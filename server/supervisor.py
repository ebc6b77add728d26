"""Keeps a worker process alive: starts it, talks to it, starts another when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any, Protocol

import msgspec

from server.caution import DEVICE_LOST, more_careful
from server.config import Settings
from server.messages import Awake, FromWorker, Outcome, Ping, Ready, Refused, Shutdown, ToWorker, frame
from server.watch import Watch
from server.worker_process import WORKER_COMMAND, WorkerProcess
from verifier.ipc import FrameReader

MAX_DEATHS = 3
DEATHS_WINDOW_S = 600.0
"""After MAX_DEATHS deaths within this time the supervisor gives up; a new worker that cannot load is a death too."""

RESTART_PAUSE_S = 1.0
"""Pause after a new worker that could not load, doubled for each one more in a row: memory may come free meanwhile."""

EXIT_GRACE_S = 10.0
"""How long a worker that was told to end, or hung up, may take before it is killed."""

LAST_WORDS_S = 1.0
"""How long after a worker's end its last events may take to be read."""

MAX_UNSENT_BYTES = 64 * 2**20
"""A worker that has left so much unread is given no more requests: what waits here for a stopped one is bounded."""


logger = logging.getLogger(__name__)


class Owner(Protocol):
    """Who is told what happens to the worker, always on the event loop and in order."""

    def on_ready(self, ready: Ready) -> None:
        """A new worker can serve; nothing of an earlier one will be heard any more."""

    def on_awake(self) -> None:
        """The worker drafts from now on."""

    def on_outcome(self, outcome: Outcome) -> None:
        """The worker told what a step did."""

    def on_down(self) -> None:
        """The worker died or hung up: nothing of it will be heard any more. Another one may be started."""

    def on_given_up(self, reason: str) -> None:
        """There will be no other worker."""


class _Link(asyncio.Protocol):
    """The API process's end of the socket to one worker. Owns the transport, the incomplete frame and the watch."""

    def __init__(self, on_message: Callable[[FromWorker], None], watch: Watch) -> None:
        self.watch = watch
        self._on_message = on_message
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), f"{transport!r} is not a stream"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            return
        self.watch.on_bytes()
        for body in self._reader.feed(data):
            message = self._decoder.decode(body)
            self.watch.on_message(message)
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    @property
    def num_unsent(self) -> int:
        """Bytes that the worker's socket did not take yet."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, message: ToWorker | Settings) -> None:
        """Queue a message; one to a worker that is gone is lost, and what mattered in it is sent to the next."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def abort(self) -> None:
        """Hear nothing more and let go of the socket at once."""
        if not self.closed.done():
            self.closed.set_result(None)
        if self._transport is not None:
            self._transport.abort()


class Supervisor:
    """Runs one worker at a time. Owns its process, the link to it, the history of deaths, and a process in reserve.

    That one has imported everything and waits: it takes over from a dead worker without what importing takes.
    """

    def __init__(
        self,
        settings: Settings,
        owner: Owner,
        command: Sequence[str] = WORKER_COMMAND,
        reserve: WorkerProcess | None = None,
    ) -> None:
        """`command` starts a worker when the number of its socket is appended; `reserve` is one already started."""
        self._settings = settings
        self._owner = owner
        self._command = tuple(command)
        self._deaths: deque[float] = deque()
        self._is_closing = False
        self._is_refused = False
        self._refusal = ""
        self._silence = ""  # why the last worker was killed, if it was
        self._num_refusals = 0
        self._is_up = False
        self._was_up = False
        self._link: _Link | None = None
        self._process: WorkerProcess | None = None
        self._reserve = reserve
        self._task: asyncio.Task[None] | None = None
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def is_behind(self) -> bool:
        """Whether the worker leaves unread what it is sent: it should get no more for now."""
        return self._link is not None and self._link.num_unsent > MAX_UNSENT_BYTES

    def start(self) -> None:
        """Begin to run workers, in the background."""
        assert self._task is None, "started twice"
        self._task = asyncio.get_running_loop().create_task(self._supervise(), name="worker supervisor")

    def send(self, message: ToWorker) -> None:
        """Queue a message for the worker that runs now, if any."""
        if self._link is not None:
            self._link.send(message)

    async def close(self) -> None:
        """End the worker, gracefully if it lets us; returns when nothing of it is left."""
        self._is_closing = True
        self.send(Shutdown())
        if self._reserve is not None:
            self._reserve.close()
            self._reserve = None
        if self._task is None:
            return
        # A worker that still loads has nothing to keep.
        _, pending = await asyncio.wait({self._task}, timeout=EXIT_GRACE_S if self._is_up else 0)
        if pending:
            self._task.cancel()  # its cleanup kills the worker
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task = None

    async def _supervise(self) -> None:
        try:
            await self._run_workers()
        except Exception:
            logger.exception("the supervisor failed")
            self._owner.on_given_up("the server failed to run its worker process; its log tells why")

    async def _run_workers(self) -> None:
        while not self._is_closing:
            code = await self._run_worker()
            if self._is_closing or self._is_refused:
                return
            now = monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > DEATHS_WINDOW_S:
                self._deaths.popleft()
            logger.error("the worker process died (exit code %s), death %d of %d", code, len(self._deaths), MAX_DEATHS)
            if code == DEVICE_LOST:
                self._settings = more_careful(self._settings)
            if len(self._deaths) >= MAX_DEATHS:
                said = f"the last one said: {self._refusal}" if self._refusal else ""
                reason = said or self._silence or "its log tells why"
                self._owner.on_given_up(f"the worker process died {len(self._deaths)} times; {reason}")
                return
            if self._refusal:
                await asyncio.sleep(RESTART_PAUSE_S * 2 ** (self._num_refusals - 1))
            self.num_restarts += 1

    async def _run_worker(self) -> int | None:
        """One worker from birth to death; returns its exit code."""
        self._refusal = self._silence = ""
        process = self._process = self._take_process()
        link = _Link(self._on_message, Watch(self._settings.worker_timeout_s, self._settings.load_timeout_s))
        try:
            await asyncio.get_running_loop().create_connection(lambda: link, sock=process.socket)
            self._link = link
            link.send(replace(self._settings, api_key=()))  # keys are for the API process alone
            if self._is_closing:
                link.send(Shutdown())
            await self._until_end(link, process)
            # One that hung up has to go; what it said before it died has been heard.
            self._let_go(link)
            await process.wait(EXIT_GRACE_S)
        finally:
            self._link, self._is_up = None, False
            link.abort()
            process.kill()
            code = await process.wait(EXIT_GRACE_S)
            if code is None:  # it hangs in the kernel, as one whose device does not come back
                logger.error("the worker process %d cannot be ended", process.pid)
                process.leave()
            self._process = None
        return code

    def _take_process(self) -> WorkerProcess:
        """The process in reserve, if it lives, else a new one."""
        reserve, self._reserve = self._reserve, None
        if reserve is not None and reserve.exit_code is None:
            return reserve
        if reserve is not None:
            reserve.close()
        return WorkerProcess(self._command)

    def _keep_reserve(self) -> None:
        """Start a process that waits, beside a worker that is done with all that takes a processor."""
        if self._settings.reserve_worker and self._reserve is None and not self._is_closing:
            self._reserve = WorkerProcess(self._command)

    async def _until_end(self, link: _Link, process: WorkerProcess) -> None:
        """Return when the worker has ended or hung up; one that is silent for too long is killed."""
        watch = link.watch
        while not watch.is_over:
            ended, _ = await asyncio.wait({link.closed}, timeout=watch.tick_s)
            if ended:
                return
            if watch.tick():
                link.send(Ping())
        what = "has not finished loading" if watch.is_loading else "has not answered"
        self._silence = f"the last one {what} for {watch.limit_s:g} s"
        logger.error("the worker process %s for %g s and is killed", what, watch.limit_s)
        process.kill()
        await asyncio.wait({link.closed}, timeout=LAST_WORDS_S)

    def _let_go(self, link: _Link) -> None:
        """The worker is of no use any more, however long its process still takes to end."""
        self._link, self._is_up = None, False
        link.abort()
        if not self._is_closing and not self._is_refused:
            self._owner.on_down()

    def _on_message(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self._is_up = self._was_up = True
            self._num_refusals = 0
            self._owner.on_ready(message)
            if message.is_awake:
                self._keep_reserve()
        elif isinstance(message, Refused):
            # What kept a first worker from loading will keep the second; a later one may only lack memory for now.
            if message.is_final or not self._was_up:
                self._is_refused = True
                self._owner.on_given_up(message.reason)
            else:
                self._refusal = message.reason
                self._num_refusals += 1
                logger.error("the new worker process cannot serve: %s", message.reason)
        elif isinstance(message, Outcome):
            self._owner.on_outcome(message)
        elif isinstance(message, Awake):
            self._owner.on_awake()
            self._keep_reserve()
