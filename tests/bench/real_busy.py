"""What is left of speculation's gain in a server that was started and used beside programs that keep all cores busy.

Each start serves some requests while the programs run. Then they end, 300 tokens or a few more come before anything
counts, and both arms answer the same prompts as those of a server that was started quietly. That one serves as many
requests before: a drafter learns from them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.bench.real_http import OFF, ON, Arm, Servers, start
from tests.bench.real_prompts import Question
from tests.bench.real_report import grid

_LOOP = "while True: pass"
_FORGETTING_TOKENS = 300
"""Tokens after which what was learned beside others must be forgotten."""
_QUIET_STARTS = 3
"""Their median is what a start beside others is held against: one may be lucky."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What each server is asked. No prompt stands in two of these."""

    beside: Sequence[Question]
    """While the programs run, again and again until the time is up; once without programs."""
    after: Sequence[Question]
    """In the first 300 tokens after they ended."""
    counted: Sequence[Question]
    """What both arms are timed on."""
    beside_s: float
    """How long a server is used beside the programs, at least."""


def measure(words: Sequence[str], asked: dict[str, Any], plan: Plan, num_starts: int) -> dict[str, Any]:
    """Three quiet starts, then `num_starts` beside busy programs. Returns what the JSON line carries."""
    quiets = [_gain(words, asked, plan, num_busy=0) for _ in range(_QUIET_STARTS)]
    quiet = median(quiets)
    print("quiet: on / off " + ", ".join(f"{gain:.2f}" for gain in quiets), file=sys.stderr)
    gains = []
    for number in range(num_starts):
        gains.append(_gain(words, asked, plan, num_busy=len(os.sched_getaffinity(0))))
        print(f"start {number + 1}: on / off {gains[-1]:.2f}, {gains[-1] / quiet:.2f} of it", file=sys.stderr)
    rows = [[str(number + 1), f"{gain:.2f}", f"{gain / quiet:.2f}"] for number, gain in enumerate(gains)]
    print(grid(["start", "on / off", "of a quiet start's"], [["quiet", f"{quiet:.2f}", "1.00"], *rows]))
    return {"quiet": [round(gain, 4) for gain in quiets], "gains": [round(gain, 4) for gain in gains]}


def _gain(words: Sequence[str], asked: dict[str, Any], plan: Plan, num_busy: int) -> float:
    """On over off, in tokens/s, of one server that was started and used beside so many busy programs."""
    servers = Servers()
    programs = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(num_busy)]
    try:
        start(words, asked, servers)
        off, on = (next(arm for arm in servers.arms if arm.name == name) for name in (OFF, ON))
        _use((off, on), plan.beside, plan.beside_s if num_busy else 0.0)
        _end(programs)
        num_tokens = 0
        for question in plan.after:
            if num_tokens < _FORGETTING_TOKENS:
                num_tokens += on.ask([question.prompt], 1).answers[0].num_completion
        seconds = {OFF: 0.0, ON: 0.0}
        for number, question in enumerate(plan.counted):
            for arm in (off, on) if number % 2 else (on, off):
                seconds[arm.name] += arm.ask([question.prompt], 1).wall_s
        return seconds[OFF] / seconds[ON]
    finally:
        _end(programs)
        servers.close()


def _use(arms: Sequence[Arm], questions: Sequence[Question], seconds: float) -> None:
    """Ask every question in both arms, again until so much time is up."""
    began, is_first = time.monotonic(), True
    while is_first or time.monotonic() - began < seconds:
        for question in questions:
            for arm in arms:
                arm.ask([question.prompt], 1)
        is_first = False


def _end(programs: Sequence[subprocess.Popen[bytes]]) -> None:
    for program in programs:
        program.kill()
        program.wait()
