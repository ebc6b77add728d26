"""Processes that render and encode prompts, and end when they take too long: started, talked to, replaced."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from server.config import ENV_PREFIX
from server.errors import ContextTooLong, EngineUnavailable, InvalidRequest, StartupError
from server.messages import FrameReader, frame
from server.model_files import ModelFiles
from server.prompt_messages import (
    MEMORY_BYTES,
    OUT_OF_MEMORY,
    Failed,
    FromPromptProcess,
    Ids,
    Job,
    Load,
    Loaded,
    Refused,
    ToPromptProcess,
)

NUM_PROCESSES = 2
LARGE_CHARS = 2**18
"""Characters of a prompt that takes about a tenth of a second. Such prompts go one at a time: the others never wait for
all processes to be done with them."""

LOAD_S = 120.0
"""How long reading the tokenizer and the template may take."""
LAST_BREATH_S = 2.0
"""How long a process that hung up may take to end, which tells why; one with a full gigabyte takes a moment."""
RETRY_S = 2.0

# No site-packages hooks: all paths are ours, and they cost a third of the start.
_COMMAND = (sys.executable, "-P", "-S", "-m", "server.prompt_process")
_READ_BYTES = 2**18
_POLL_S = 0.005

Result = TypeVar("Result")

log = logging.getLogger(__name__)


class _Process:
    """One process. Owns it and our end of its socket."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [*_COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                start_new_session=True,  # a Ctrl-C on the terminal is for the API process alone
            )
        self._link.setblocking(False)
        self._decoder: msgspec.msgpack.Decoder[FromPromptProcess] = msgspec.msgpack.Decoder(FromPromptProcess)
        self._reader = FrameReader()

    async def ask(self, message: ToPromptProcess) -> FromPromptProcess:
        """Send a message and wait for its answer. Raises EOFError when the process is gone."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._link, frame(message))
            while True:
                data = await loop.sock_recv(self._link, _READ_BYTES)
                if not data:
                    raise EOFError
                for body in self._reader.feed(data):
                    return self._decoder.decode(body)
        except ConnectionError:
            raise EOFError from None

    async def exit_code(self) -> int | None:
        """How the process ended that hung up: negative is a signal. None if it does not end."""
        for _ in range(int(LAST_BREATH_S / _POLL_S)):
            if (code := self._child.poll()) is not None:
                return code
            await asyncio.sleep(_POLL_S)
        return None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is left."""
        return self._child.poll() is not None

    def kill(self) -> None:
        """End it, whatever it does; who waits for its answer gets EOFError."""
        if self._child.poll() is None:
            self._child.kill()

    def close(self) -> None:
        """Let go of its socket, when nobody waits for its answer."""
        self._link.close()

    def wait(self) -> None:
        """After `kill`: until nothing of it is left."""
        self._child.wait()


@dataclass(slots=True)
class _Waiter:
    """A job that waits for a process."""

    is_large: bool
    process: asyncio.Future[_Process]


class PromptPool:
    """Hands jobs to processes. Owns the processes and the queue for them; `close` ends both.

    A process starts when a job finds none free, or all do with `start`. It is bound to no event loop.
    """

    def __init__(self, files: ModelFiles):
        self._files = files
        self._living: set[_Process] = set()
        self._idle: list[_Process] = []
        self._dying: list[_Process] = []
        self._waiting: deque[_Waiter] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_large = 0
        self._is_closed = False
        weakref.finalize(self, _end, self._living, self._dying)

    async def start(self) -> None:
        """Start all processes. Raises StartupError in one clear line when the model's files are at fault."""
        await asyncio.gather(*(self._bring_up() for _ in range(NUM_PROCESSES)))

    async def run(self, job: Job, num_chars: int) -> tuple[int, ...]:
        """Do a job. Who gives up waiting leaves the queue; a job that has begun goes on by itself, within its time.

        Raises InvalidRequest, also when the job takes more time or memory than it may.
        """
        is_large = num_chars > LARGE_CHARS
        process = await self._take(is_large)
        task = self._keep(asyncio.get_running_loop().create_task(self._serve(process, job, is_large)))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be nobody's any more
        return await asyncio.shield(task)

    def close(self) -> None:
        """End the processes; what still runs or waits fails."""
        self._is_closed = True
        for waiter in self._waiting:
            if not waiter.process.done():
                waiter.process.set_exception(_unavailable())
        self._waiting.clear()
        for process in self._living:
            process.kill()
            process.wait()
        for process in self._idle:
            self._bury(process)
        self._idle.clear()

    async def _take(self, is_large: bool) -> _Process:
        if self._is_closed:
            raise _unavailable()
        waiter = _Waiter(is_large, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._dispatch()
        if not waiter.process.done() and len(self._living) < NUM_PROCESSES:
            self._replenish()
        try:
            return await waiter.process
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.process.done() and not waiter.process.cancelled() and waiter.process.exception() is None:
                self._give(waiter.process.result(), is_large)
            raise

    def _give(self, process: _Process, is_large: bool = False) -> None:
        self._num_large -= is_large
        self._idle.append(process)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give free processes to those who wait, in order; of large jobs one at a time."""
        for waiter in list(self._waiting):
            while self._idle and self._idle[-1].has_ended:
                self._bury(self._idle.pop())
            if not self._idle:
                return
            if waiter.is_large and self._num_large:
                continue
            self._waiting.remove(waiter)
            if not waiter.process.done():
                self._num_large += waiter.is_large
                waiter.process.set_result(self._idle.pop())

    async def _serve(self, process: _Process, job: Job, is_large: bool) -> tuple[int, ...]:
        try:
            async with asyncio.timeout(job.timeout_s):
                answer = await process.ask(job)
        except (TimeoutError, EOFError) as error:
            is_late = isinstance(error, TimeoutError)
            reason = f"took longer than {job.timeout_s:.3g} s" if is_late else await _why(process)
            self._bury(process)
            self._num_large -= is_large
            if self._is_closed:
                raise _unavailable() from None
            log.warning("rendering and encoding a prompt %s: its process is replaced", reason)
            self._replenish()
            raise InvalidRequest(f"Rendering and encoding '{job.param}' {reason}.", param=job.param) from None
        except BaseException:
            self._bury(process)
            self._num_large -= is_large
            raise
        self._give(process, is_large)
        if isinstance(answer, Ids):
            return answer.ids
        if isinstance(answer, Refused):
            raise (ContextTooLong if answer.is_too_long else InvalidRequest)(answer.message, param=answer.param)
        raise RuntimeError(f"the process that encodes prompts: {answer}")

    async def _bring_up(self) -> None:
        process = _Process()
        self._living.add(process)
        answer: FromPromptProcess | None = None
        reason = f"took longer than {LOAD_S:.0f} s"
        try:
            async with asyncio.timeout(LOAD_S):
                answer = await process.ask(Load(self._files))
        except TimeoutError:
            pass
        except EOFError:
            reason = await _why(process)
        finally:
            if not isinstance(answer, Loaded):
                self._bury(process)
        if isinstance(answer, Refused):
            raise StartupError(answer.message)
        if not isinstance(answer, Loaded):
            if isinstance(answer, Failed):
                log.error("%s", answer.story)
                reason = f"failed: {answer.story.strip().splitlines()[-1]}"
            raise StartupError(f"reading the tokenizer and the chat template {reason}")
        self._give(process)

    def _replenish(self) -> None:
        """Start another process in the background."""
        if not self._is_closed:
            self._keep(asyncio.get_running_loop().create_task(self._bring_up())).add_done_callback(self._on_brought_up)

    def _on_brought_up(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("no process to encode prompts could be started: %s", error)
        if not self._living:  # the next request tries again; these need not wait for it
            for waiter in self._waiting:
                waiter.process.set_exception(_unavailable())
            self._waiting.clear()

    def _keep(self, task: asyncio.Task[Result]) -> asyncio.Task[Result]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _bury(self, process: _Process) -> None:
        """Nobody waits for this process any more."""
        process.kill()
        process.close()
        self._living.discard(process)
        self._dying[:] = [dying for dying in (*self._dying, process) if not dying.has_ended]


def _end(living: set[_Process], dying: list[_Process]) -> None:
    """What is left of a pool that nobody has any more."""
    for process in (*living, *dying):
        process.kill()
        process.close()
        process.wait()


async def _why(process: _Process) -> str:
    """What a process that hung up died of."""
    code = await process.exit_code()
    if code in (OUT_OF_MEMORY, -signal.SIGABRT):  # Python's way and that of the tokenizers library
        return f"needs more than the {MEMORY_BYTES // 2**20} MiB of memory that it may have"
    return f"ended the process that did it (exit code {code})"


def _unavailable() -> EngineUnavailable:
    return EngineUnavailable("no process to encode prompts is there", retry_after_s=RETRY_S)


def _environment() -> dict[str, str]:
    """Ours, without settings and keys, and with everything importable that is so here."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in (root, *sys.path) if path]
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
    return {**ours, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
