"""Processes that render and encode prompts, and end when they take too long: started, talked to, replaced."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from server.child_environment import child_environment
from server.errors import (
    ContextTooLong,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
    StartupError,
    UnsupportedParameter,
)
from server.messages import frame
from server.model_files import ModelFiles
from server.prompt_messages import (
    MEMORY_BYTES,
    OUT_OF_MEMORY,
    Chat,
    Check,
    Checked,
    Encode,
    EncodeWords,
    Failed,
    FromPromptProcess,
    Ids,
    Job,
    Load,
    Loaded,
    Predict,
    Refused,
    ToPromptProcess,
)
from verifier.ipc import FrameReader

NUM_PROCESSES = 2
LARGE_CHARS = 2**18
"""Characters of a prompt that takes about a tenth of a second. Such prompts go one at a time: the others never wait for
all processes to be done with them."""

MAX_WAITING_CHARS = 2**26
"""Characters of all prompts that wait for a process: they are the API process's own memory."""

LOAD_S = 120.0
"""How long reading the tokenizer and the template may take."""
LAST_BREATH_S = 2.0
"""How long a process that hung up may take to end, which tells why; one with a full gigabyte takes a moment."""
RETRY_S = 2.0
_ATTEMPTS = 2
"""A process may be killed for what others do; a prompt that loses so many is given up."""
_MEMORY_CODES = (OUT_OF_MEMORY, -signal.SIGABRT)
"""Python's way to end without memory and that of the tokenizers library."""

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
                env=child_environment() | {"TOKENIZERS_PARALLELISM": "false"},
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


class _ProcessLost(Exception):
    """The process ended in the middle of a job, and not because of it as far as anybody can tell."""


@dataclass(slots=True)
class _Waiter:
    """A job that waits for a process."""

    is_large: bool
    num_chars: int
    process: asyncio.Future[_Process]


class PromptPool:
    """Hands jobs to processes. Owns the processes and the queue for them; `close` ends both.

    A process starts when a job finds none free, or all do with `start`. It is bound to no event loop.
    """

    def __init__(self, files: ModelFiles):
        self._files = files
        self._living: set[_Process] = set()
        self._coming: set[object] = set()  # one for each process to be started by a task that has not run yet
        self._idle: list[_Process] = []
        self._dying: list[_Process] = []
        self._waiting: deque[_Waiter] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_large = 0
        self._is_closed = False
        weakref.finalize(self, _end, self._living, self._dying)

    async def start(self) -> None:
        """Start all processes. Raises StartupError in one clear line when the model's files are at fault."""
        await asyncio.gather(*(self._begin() for _ in range(self._num_missing())))

    async def run(self, job: Chat | Encode | Predict, num_chars: int) -> tuple[int, ...]:
        """The ids of a prompt; raises as `_do` does."""
        answer = await self._do(job, num_chars, is_large=num_chars > LARGE_CHARS)
        assert isinstance(answer, Ids)
        return answer.ids

    async def run_words(self, job: EncodeWords, num_chars: int) -> Ids:
        """The ids of several texts; raises as `_do` does."""
        answer = await self._do(job, num_chars, is_large=num_chars > LARGE_CHARS)
        assert isinstance(answer, Ids)
        return answer

    async def check(self, job: Check) -> str:
        """The text of a grammar that can be compiled; raises as `_do` does.

        A short grammar may take all the time there is, so each counts as a large job: one process is left for prompts.
        """
        answer = await self._do(job, len(job.grammar.text), is_large=True)
        assert isinstance(answer, Checked)
        return answer.grammar

    async def _do(self, job: Job, num_chars: int, *, is_large: bool) -> Ids | Checked:
        """Do a job. Who gives up waiting leaves the queue; a job that has begun goes on by itself, within its time.

        Raises InvalidRequest, also when the job takes more time or memory than it may; Overloaded when too much waits;
        EngineUnavailable when its processes end for no known reason.
        """
        for _ in range(_ATTEMPTS):
            process = await self._take(is_large, num_chars)
            task = self._keep(asyncio.get_running_loop().create_task(self._serve(process, job, is_large)))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may be nobody's any more
            try:
                return await asyncio.shield(task)
            except _ProcessLost:
                continue
        raise EngineUnavailable(
            f"the processes that were to work on '{job.param}' ended unexpectedly", retry_after_s=RETRY_S
        )

    def close(self) -> None:
        """End the processes; what still runs or waits fails."""
        self._is_closed = True
        self._turn_away()
        for process in self._living:
            process.kill()
            process.wait()
        for process in self._idle:
            self._bury(process)
        self._idle.clear()

    async def _take(self, is_large: bool, num_chars: int) -> _Process:
        if self._is_closed:
            raise _unavailable()
        waiter = _Waiter(is_large, num_chars, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._dispatch()
        if not waiter.process.done():
            if len(self._waiting) > 1 and sum(each.num_chars for each in self._waiting) > MAX_WAITING_CHARS:
                self._waiting.remove(waiter)
                raise Overloaded("Too many large prompts wait to be encoded; come back later.", retry_after_s=RETRY_S)
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
        if self._is_closed:
            self._bury(process)
        else:
            self._idle.append(process)
        self._finish(is_large)

    def _finish(self, is_large: bool) -> None:
        """A job is over, however it went; the next large one may begin on any free process."""
        self._num_large -= is_large
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

    async def _serve(self, process: _Process, job: Job, is_large: bool) -> Ids | Checked:
        try:
            async with asyncio.timeout(job.timeout_s):
                answer = await process.ask(job)
        except (TimeoutError, EOFError) as error:
            code = await process.exit_code() if isinstance(error, EOFError) else None
            self._bury(process)
            self._finish(is_large)
            if self._is_closed:
                raise _unavailable() from None
            is_late = isinstance(error, TimeoutError) or code == -signal.SIGALRM  # the process has its own clock
            reason = f"took longer than {job.timeout_s:.3g} s" if is_late else _why(code)
            is_too_deep = code == -signal.SIGSEGV and isinstance(job, Check)
            if is_too_deep:
                reason = "needs more than the stack that it may have: it nests too deeply"
            log.warning(
                "%s %s: its process is replaced",
                _deed(job, "a grammar" if isinstance(job, Check) else "a prompt"),
                reason,
            )
            self._replenish()
            if not is_late and not is_too_deep and code not in _MEMORY_CODES:
                raise _ProcessLost from None
            deed = _deed(job, f"'{job.param}'")
            raise InvalidRequest(f"{deed[0].upper()}{deed[1:]} {reason}.", param=job.param) from None
        except BaseException:
            self._bury(process)
            self._finish(is_large)
            raise
        self._give(process, is_large)
        if isinstance(answer, Ids | Checked):
            return answer
        if isinstance(answer, Refused):
            raise _refusal(answer)
        raise RuntimeError(f"the process that encodes prompts: {answer}")

    async def _bring_up(self, coming: object) -> None:
        self._coming.discard(coming)
        if self._is_closed:
            return
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
            reason = _why(await process.exit_code())
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

    def _num_missing(self) -> int:
        return NUM_PROCESSES - len(self._living) - len(self._coming)

    def _begin(self) -> asyncio.Task[None]:
        """Start another process, which counts from now on."""
        coming = object()
        self._coming.add(coming)
        task = self._keep(asyncio.get_running_loop().create_task(self._bring_up(coming)))
        task.add_done_callback(lambda _: self._coming.discard(coming))  # a task cancelled too early never runs
        return task

    def _replenish(self) -> None:
        """Start another process in the background, if there is room for one."""
        if not self._is_closed and self._num_missing() > 0:
            self._begin().add_done_callback(self._on_brought_up)

    def _on_brought_up(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None or self._is_closed:
            return
        log.error("no process to encode prompts could be started: %s", error)
        if not self._living and not self._coming:  # the next request tries again; these need not wait for it
            self._turn_away()

    def _turn_away(self) -> None:
        """Nobody will come for those who wait."""
        for waiter in self._waiting:
            if not waiter.process.done():
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


def _why(code: int | None) -> str:
    """What a process that hung up died of."""
    if code in _MEMORY_CODES:
        return f"needs more than the {MEMORY_BYTES // 2**20} MiB of memory that it may have"
    return f"ended the process that did it (exit code {code})"


def _deed(job: Job, what: str) -> str:
    return f"compiling {what}" if isinstance(job, Check) else f"rendering and encoding {what}"


def _refusal(answer: Refused) -> InvalidRequest:
    if answer.is_unsupported:
        return UnsupportedParameter(answer.message, param=answer.param)
    return (ContextTooLong if answer.is_too_long else InvalidRequest)(answer.message, param=answer.param)


def _unavailable() -> EngineUnavailable:
    return EngineUnavailable("no process to encode prompts is there", retry_after_s=RETRY_S)
