"""A worker process over the toy target: `python -m tests.fake_worker [--step-s S] [--crash-on TOKEN] ...  FD`."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

from drafters.base import Drafter
from server.config import Settings
from server.errors import StartupError
from server.messages import Ready
from server.worker.drafting import Drafting
from server.worker.loop import Loop
from server.worker.main import Work, main
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from tests.fakes import FakeGeometry, FakeVerifier, FuzzDrafter
from verifier.plan import StepPlan, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict


class SlowVerifier:
    """The toy target at a pace that leaves time for accidents; one token kills it."""

    def __init__(self, geometry: FakeGeometry, step_s: float, deadly: int | None, hang_up: int | None, fd: int) -> None:
        self._toy = FakeVerifier(geometry)
        self._step_s = step_s
        self._deadly = deadly
        self._hang_up = hang_up
        self._fd = fd

    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted) -> Verdict:
        time.sleep(self._step_s)
        if any(self._deadly in start.tokens for start in plan.starts):
            os._exit(9)
        if any(self._hang_up in start.tokens for start in plan.starts):
            socket.socket(fileno=self._fd).shutdown(socket.SHUT_RDWR)
            time.sleep(60)
        return self._toy.run(plan, trees, wanted)


class Preparing:
    """Prepares for a while, once nobody waits."""

    takes_long = is_awake = True

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, is_idle: bool) -> bool:
        time.sleep(self._seconds * is_idle)
        return False


def load_with(options: argparse.Namespace, settings: Settings) -> Work:
    if options.refuse:
        raise StartupError("this model is not to be served")
    if options.crash:
        os._exit(7)
    if options.lose_device and (not settings.eager or settings.attention != "sdpa"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    time.sleep(options.load_s)
    if options.tell is not None:
        Path(options.tell).write_text(repr((settings, dict(os.environ))))
    if options.load_once is not None:
        with open(options.load_once, "x"):  # fails from the second worker on
            pass
    geometry = FakeGeometry(
        max_model_len=settings.max_model_len,
        num_pages=settings.num_pages,
        page_size=settings.page_size,
        max_rows=settings.max_num_seqs,
        max_positions=settings.max_num_batched_tokens,
    )
    limits = Limits(
        max_rows=settings.max_num_seqs,
        max_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        num_pages=settings.num_pages,
        page_size=settings.page_size,
    )
    drafters: dict[str, Drafter] = {"fuzz": FuzzDrafter(int(np.random.default_rng().integers(99)), geometry.vocab_size)}
    drafting = Drafting(drafters, max_rows=settings.max_num_seqs, vocab_size=geometry.vocab_size, is_checked=True)
    verifier = SlowVerifier(geometry, options.step_s, options.crash_on, options.hang_up_on, int(options.fd))
    ready = Ready(limits.context_len, geometry.vocab_size, drafting.names, "toy", "none")
    loop = Loop(verifier, Scheduler(limits), Speculator(drafting, limits.max_rows), geometry.vocab_size)
    return Work(loop, ready, Preparing(options.prepare_s))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.002)
    parser.add_argument("--crash-on", type=int, default=None)
    parser.add_argument("--hang-up-on", type=int, default=None)
    parser.add_argument("--tell", default=None)
    parser.add_argument("--crash", action="store_true")
    parser.add_argument("--lose-device", action="store_true")
    parser.add_argument("--refuse", action="store_true")
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--load-once", default=None)
    parser.add_argument("--prepare-s", type=float, default=0.0)
    parser.add_argument("fd")
    parsed = parser.parse_args()
    sys.exit(main([parsed.fd], lambda settings: load_with(parsed, settings)))
