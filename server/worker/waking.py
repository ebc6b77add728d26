"""A worker answers as soon as its model is read, and gets quicker while it serves: what it lacks is made between steps.

Until then tokens are chosen by torch and nothing is drafted. No text depends on it.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

from server.config import Settings
from server.worker.apart import is_device_lost
from server.worker.kept_profile import KeptProfile
from server.worker.loop import Loop
from server.worker.rehearsal import COMMAND, mark, rehearse
from server.worker.step_cost import StepCost
from server.worker.trials import measure
from verifier.backend import Backend
from verifier.cpu.threads import team_size

_POLL_S = 0.01
"""How long an idle worker waits for the compiling process before it looks for requests again."""

logger = logging.getLogger(__name__)


class Waking:
    """Owns the process that compiles, and where the worker stands.

    In turn: compile what is not on disk, in a process of its own; load it, a little between two steps; let the back end
    use it and the drafters wake; measure what steps cost; then make the back end's steps quicker while it has a way.
    """

    def __init__(self, backend: Backend, loop: Loop, kept: KeptProfile, states_width: int) -> None:
        """`states_width` of the hidden states that drafters are told. The loop's drafters must be asleep."""
        self._backend, self._loop, self._kept = backend, loop, kept
        self._vocab_size, self._width = backend.geometry.vocab_size, states_width
        self._is_idle = True
        self._turns = self._run()
        self.is_awake = False
        """Whether drafters draft."""
        self.is_measured = False
        """Whether costs were measured, or cannot be."""
        self.takes_long = False
        """Whether a turn of an idle worker may take minutes."""

    def __call__(self, is_idle: bool) -> bool:
        """Do a turn between steps, a short one if requests run. Returns: whether to call again when idle."""
        self._is_idle = is_idle
        return next(self._turns)

    def load(self) -> None:
        """Compile and load all at once, before anybody is served."""
        while not self.is_awake:
            self(True)

    def measure(self) -> None:
        """Measure all at once, before anybody is served."""
        while not self.is_measured:
            self(True)

    def _run(self) -> Iterator[bool]:
        yield from self._compile()
        drafting, limits = self._loop.drafting, self._loop.scheduler.limits
        done = mark()
        self.takes_long = done is None or not done.exists()  # then functions are compiled in this process
        for _ in rehearse(drafting.drafters, self._vocab_size, limits.max_rows, self._width):
            yield True
        self._backend.use_compiled(True)
        self._loop.wake()
        profile = self._kept.load()
        if profile is not None:
            self._loop.speculator.begin(StepCost(profile, limits.max_batched_tokens, self._backend.step_sizes))
        self.is_awake, self.takes_long = True, False
        logger.info("drafting from now on")
        yield True
        yield from self._measure()
        self.is_measured, self.takes_long = True, True
        num_measured = self._backend.num_recorded
        yield True
        while True:
            has_more, num_recorded = self._backend.warm(is_idle=self._is_idle), self._backend.num_recorded
            if self._is_idle and not has_more and num_recorded != num_measured:
                num_measured = num_recorded
                yield from self._measure()
            yield has_more

    def _compile(self) -> Iterator[bool]:
        """Wait until the compiled functions are on disk. If they cannot be, they are compiled when they are loaded."""
        done = mark()
        if done is None or done.exists():
            return
        logger.info("compiling beside serving: nothing is drafted until that is done, in half a minute or so")
        with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                while process.poll() is None:
                    yield True
                    if self._is_idle:
                        _wait(process)
            finally:
                process.kill()
            if process.returncode and process.stderr is not None:
                last = process.stderr.read().strip().rpartition("\n")[2]
                logger.warning("compiling in a process of its own failed (%s): it is done in this one", last)

    def _measure(self) -> Iterator[bool]:
        """Measure while nobody runs. What fails leaves the costs as they were."""
        turns = measure(self._loop, self._backend, self._vocab_size, self._backend.step_sizes)
        while True:
            while not self._is_idle:
                yield True
            try:
                next(turns)
            except StopIteration as end:
                if end.value is not None:
                    self._kept.save(end.value)
                return
            except Exception as error:
                if is_device_lost(error):
                    raise
                logger.warning("what steps cost is not measured: %s", error)
                return
            yield True


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def name_of_costs(settings: Settings, backend: Backend) -> str:
    """What costs depend on."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8", errors="replace").splitlines() if processor.exists() else []
    names = sorted({line for line in lines if line.startswith("model name")})
    chosen = (settings.model, settings.revision, settings.compile, settings.eager, settings.ctc_head)
    return repr((chosen, backend.name, backend.geometry, names, team_size()))
