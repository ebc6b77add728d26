"""A worker that answers first and gets quick beside it: nothing of it shows in a text, and nothing is compiled late."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from numba.core.registry import CPUDispatcher

from drafters.base import NOBODY
from server.worker import waking
from server.worker.kept_profile import KeptProfile
from server.worker.rehearsal import rehearse
from server.worker.step_cost import Profile, StepSample
from server.worker.waking import Waking
from tests.drafting import make_view
from tests.fakes import FakeGeometry, FakeVerifier, FuzzDrafter, make_loop, plain_answer, submit_of
from tests.families import VOCAB, save_model
from tests.parity.harness import greedy, run_all, submit
from tests.parity.harness import make_loop as make_real_loop
from verifier.load import load_backend
from verifier.options import VerifierOptions

PROFILE = Profile((StepSample(1, 1, 0.01), StepSample(64, 1, 0.02)))


class Sleeper(FakeVerifier):
    """A back end that counts what it is told. Its steps get quicker twice."""

    name = "fake"
    num_recorded = 0
    step_sizes = ()
    is_compiled_used = False

    def use_compiled(self, is_on: bool) -> None:
        self.is_compiled_used = is_on

    def warm(self, *, is_idle: bool) -> bool:
        if self.num_recorded < 2 and is_idle:
            self.num_recorded += 1
        return self.num_recorded < 2


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeptProfile:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return KeptProfile("a machine")


@pytest.fixture(autouse=True)
def quick_rehearsal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(waking, "rehearse", lambda *_: iter([None, None]))
        monkeypatch.setattr(waking, "mark", lambda: tmp_path / "mark")
        monkeypatch.setattr(waking, "COMMAND", (sys.executable, "-c", f"open({str(tmp_path / 'mark')!r}, 'w')"))


def asleep(kept: KeptProfile) -> tuple[Sleeper, Any, Waking]:
    judge = Sleeper(FakeGeometry(num_pages=200))
    loop = make_loop(judge.geometry, drafters={"fuzz": FuzzDrafter(0, 50)})
    loop._verifier = judge
    loop.drafting.is_asleep = True
    return judge, loop, Waking(judge, loop, kept, 1)  # type: ignore[arg-type]


def answer_of(loop: Any, step: Any) -> list[int]:
    found: list[int] = []
    while loop.has_work:
        found += [token for delta in loop.step().deltas for token in delta.tokens]
        step()
    return found


def test_it_wakes_beside_a_request_that_drafts_from_then_on(kept: KeptProfile) -> None:
    judge, loop, wake = asleep(kept)
    fuzz = loop.drafting.drafters["fuzz"]
    request = submit_of([1, 2], drafter="fuzz", max_tokens=200)
    loop.handle(request)
    drafted_before = 0

    def step() -> None:
        nonlocal drafted_before
        if not wake.is_awake:
            drafted_before = fuzz.num_verified
            time.sleep(0.02)  # a child has to start, and the answer to last as long
        assert wake(False)

    assert answer_of(loop, step) == plain_answer(request, 50, 256)[0]
    assert wake.is_awake
    assert judge.is_compiled_used
    assert drafted_before == 0
    assert fuzz.num_verified > 0
    assert not wake.is_measured, "steps are measured when nobody waits"


def test_costs_are_measured_when_idle_kept_and_known_to_the_next(kept: KeptProfile) -> None:
    judge, loop, wake = asleep(kept)
    assert kept.load() is None
    wake.load()
    assert loop.speculator.cost is None
    wake.measure()
    assert loop.speculator.cost is not None
    profile = kept.load()
    assert profile is not None
    assert profile.steps
    assert wake.takes_long
    while wake(True):
        pass
    assert judge.num_recorded == 2
    _, other, again = asleep(kept)
    again.load()
    assert other.speculator.cost is not None, "without measuring"


@pytest.mark.parametrize("content", [b"", b"{}", b'{"steps":[]}', b'{"steps":[[1,2]]}', b"\xff", b"["])
def test_costs_that_cannot_be_read_are_none(content: bytes, kept: KeptProfile, tmp_path: Path) -> None:
    kept.save(PROFILE)
    assert kept.load() == PROFILE
    (file,) = (tmp_path / "foretoken").iterdir()
    file.write_bytes(content)
    assert kept.load() is None
    file.unlink()
    (tmp_path / "foretoken").chmod(0o777)  # anybody's
    kept.save(PROFILE)
    assert kept.load() is None


def test_compiling_that_fails_is_told_and_done_here(
    kept: KeptProfile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waking, "COMMAND", (sys.executable, "-c", "raise SystemExit('no room')"))
    _, _, wake = asleep(kept)
    wake.load()
    assert wake.is_awake
    assert "no room" in caplog.text


def compiled_functions() -> Iterator[tuple[str, CPUDispatcher]]:
    for name, module in sorted(sys.modules.items()):
        if name.split(".")[0] in ("verifier", "drafters") or name.startswith("server.worker"):
            for attribute, value in vars(module).items():
                if isinstance(value, CPUDispatcher):
                    yield f"{name}.{attribute}", value


def test_real_answers_compile_nothing_that_the_rehearsal_did_not(tmp_path: Path) -> None:
    options = VerifierOptions(
        model=save_model("llama", tmp_path), device="cpu", threads=1, max_rows=4, num_pages=80, is_compiled=True
    )
    verifier = load_backend(options)
    drafters = {name: make_view(name, VOCAB) for name in ("trigram", "suffix", "hybrid")}
    for _ in rehearse(drafters, VOCAB, 4, 32):
        pass
    before = {name: len(function.signatures) for name, function in compiled_functions()}
    assert sum(before.values()) > 8
    loop = make_real_loop(verifier, drafters)
    requests = [submit(name, range(3, 30), greedy(24), name) for name in drafters]
    run = run_all(loop, requests, arrivals=[0, 3, 6])
    assert len(run.answers) == 3
    assert before == {name: len(function.signatures) for name, function in compiled_functions()}
    assert NOBODY not in run.answers
