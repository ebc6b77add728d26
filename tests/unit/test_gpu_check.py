"""The GPU check on a CPU: its whole logic runs, what is wrong is told, what fails or hangs takes nothing else along."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import gpu_check
from tests.bench.gpu_parity import Truth, compare, draft
from tests.bench.gpu_report import judge, table
from tests.bench.gpu_room import Room
from tests.bench.gpu_steps import DeviceTime, union
from tests.devices import require_kernels

ROOT = Path(__file__).resolve().parents[2]


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.bench.gpu_check", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    require_kernels("cpu")
    done = run_check("--out", str(tmp_path / "found.json"))
    report = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 1, done.stderr  # a CPU does not meet the criteria of a GPU
    assert {"bench", "device", "torch", "transformers", "triton", "wall_s", "sections", "criteria"} <= set(report)
    sections = report["sections"]
    assert list(sections) == list(gpu_check.SECTIONS)
    for name, found in sections.items():
        assert not {"error", "errors", "left_out"} & set(found), (name, found)
    assert sections["kernels"]["passed"] is True
    assert {"sampling", "move", "attention bfloat16", "attention float32"} <= set(sections["kernels"]["checks"])
    assert {"context", "rows", "nodes", "us", "floor_us", "of_copy"} == set(sections["bandwidth"]["cells"][0])
    cells = sections["steps"]["cells"]
    assert {(cell["shape"], cell["mode"]) for cell in cells} == {
        (shape, mode) for shape in ("llama-8b", "qwen-0.5b") for mode in ("graphs", "eager")
    }
    assert {"ms", "floor_ms", "of_floor", "device_ms", "bubbles_ms", "gap_ms"} <= set(cells[0])
    assert all(cell["is_finite"] for cell in cells)
    assert set(sections["generate"]["tokens_per_s"]["llama-8b"]) == {
        "verifier",
        "generate",
        "generate static compiled",
    }
    assert sections["parity"]["passed"] is True
    assert all(run["ok"] for run in sections["parity"]["runs"] + sections["parity"]["sampled"])
    assert {name for name, entry in report["criteria"].items() if entry["ok"]} >= {
        "kernels are right",
        "answers are right",
    }
    assert "NOT MET 64 nodes of 1 node" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["criteria"] == report["criteria"]


@pytest.mark.slow
def test_a_section_of_its_own_process(tmp_path: Path) -> None:
    require_kernels("cpu")
    done = run_check("--out", str(tmp_path / "found.json"), "--apart", "--sections", "bandwidth")
    found = json.loads((tmp_path / "found.json").read_text())["sections"]["bandwidth"]
    assert "error" not in found, (found, done.stderr)
    assert len(found["cells"]) == 4


def test_a_process_that_dies_is_told() -> None:
    found = gpu_check.run_apart("no such section", argparse.Namespace(tiny=True), 60.0)
    assert found["error"].startswith("ended with status 2: ")
    assert "no such section" in found["error"]


def kernels_of(room: Room) -> dict[str, Any]:
    require_kernels("cpu")
    gpu_check.run_here("kernels", room)
    return room.found


def tiny_room(limit_s: float = 300.0) -> Room:
    return Room("cpu", True, time.monotonic() + limit_s)


def test_a_wrong_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels("cpu")
    from verifier.cuda.attention import PlannedTriton

    right = PlannedTriton.attend
    monkeypatch.setattr(PlannedTriton, "attend", lambda self, inputs: right(self, inputs) * 1.02)
    found = kernels_of(tiny_room())
    assert found["passed"] is False
    assert found["checks"]["attention float32"]["failed"] > 0
    assert found["checks"]["attention bfloat16"]["failed"] > 0
    assert found["checks"]["sampling"]["failed"] == found["checks"]["move"]["failed"] == 0
    assert "times the error allowed" in found["failures"][0]
    assert judge({"kernels": found})["kernels are right"]["ok"] is False


def test_wrong_tokens_and_a_kernel_that_raises_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels("cpu")
    import verifier.cuda.kernels.move
    import verifier.cuda.kernels.sample

    right = verifier.cuda.kernels.sample.sample
    monkeypatch.setattr("verifier.cuda.kernels.sample.sample", lambda logits, records: right(logits, records) + 1)

    def fault(*args: Any) -> None:
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr("verifier.cuda.kernels.move.move", fault)
    found = kernels_of(tiny_room())
    assert found["checks"]["sampling"]["passed"] == found["checks"]["move"]["passed"] == 0
    assert "move: RuntimeError: an illegal memory access" in found["failures"]
    assert found["checks"]["attention float32"]["failed"] == 0


def test_no_time_is_no_pass() -> None:
    assert kernels_of(tiny_room(0.0))["passed"] is False


def failing(room: Room) -> None:
    room.add("cells", {"a": 1})
    logging.getLogger("verifier.cuda.backend").warning("the forward pass is %s", "not compiled")
    raise ValueError("this went wrong")


def hanging(room: Room) -> None:
    room.found["begun"] = True
    try:
        time.sleep(60)
    except Exception:
        room.found["swallowed"] = True


def sound(room: Room) -> None:
    room.found["passed"] = True


def test_one_section_takes_no_other_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = "tests.unit.test_gpu_check"
    sections = {"steps": (f"{here}:failing", 1.0), "bandwidth": (f"{here}:hanging", 1.0)}
    monkeypatch.setattr(gpu_check, "SECTIONS", {**sections, "kernels": (f"{here}:sound", 1.0)})
    monkeypatch.setattr(gpu_check, "_LEAST_S", 0.1)
    monkeypatch.setattr(gpu_check, "_MARGIN_S", 0.5)
    out = tmp_path / "found.json"
    options = argparse.Namespace(tiny=True, apart=False, total_s=100.0, sections=list(gpu_check.SECTIONS), out=out)
    report = gpu_check.run_all(options)
    found = report["sections"]
    assert found["steps"] == {
        **found["steps"],
        "cells": [{"a": 1}],
        "warnings": ["the forward pass is not compiled"],
        "error": "ValueError: this went wrong",
    }
    assert found["bandwidth"]["begun"] is True
    assert found["bandwidth"]["error"] == "OutOfTime: interrupted at its limit"
    assert "swallowed" not in found["bandwidth"]
    assert found["kernels"]["passed"] is True
    assert json.loads(out.read_text()) == report
    assert "this went wrong" in table(report)


GOOD: dict[str, dict[str, Any]] = {
    "kernels": {"passed": True},
    "bandwidth": {
        "cells": [
            {"context": 32768, "rows": 1, "nodes": 1, "of_copy": 0.8},
            {"context": 32768, "rows": 8, "nodes": 8, "of_copy": 0.71},
            {"context": 32768, "rows": 1, "nodes": 64, "of_copy": 0.3},
            {"context": 512, "rows": 1, "nodes": 1, "of_copy": 0.1},
        ]
    },
    "steps": {
        "cells": [
            {"shape": "llama-8b", "mode": mode, "rows": 1, "nodes": nodes, "ms": ms, "of_floor": ms / 4, "gap_ms": 0.2}
            for mode, nodes, ms in (("eager", 1, 30.0), ("graphs", 1, 4.8), ("graphs", 64, 5.3))
        ]
    },
    "parity": {"passed": True},
}


def test_criteria_that_are_met() -> None:
    entries = judge(GOOD)
    assert len(entries) == 6
    assert all(entry["ok"] for entry in entries.values()), entries
    assert entries["64 nodes of 1 node"]["found"] == 1.104
    assert entries["kernel of copy bandwidth at 32k"]["found"] == 0.71


@pytest.mark.parametrize(
    ("section", "place", "change", "name"),
    [
        ("steps", 1, {"of_floor": 1.66}, "8B step of its bytes floor"),
        ("steps", 1, {"gap_ms": 0.51}, "host gap in ms"),
        ("steps", 2, {"ms": 6.1}, "64 nodes of 1 node"),
        ("steps", 2, {"nodes": 32}, "64 nodes of 1 node"),
        ("bandwidth", 1, {"of_copy": 0.69}, "kernel of copy bandwidth at 32k"),
    ],
)
def test_a_criterion_that_is_not_met(section: str, place: int, change: dict[str, Any], name: str) -> None:
    found = copy.deepcopy(GOOD)
    found[section]["cells"][place].update(change)
    assert [key for key, entry in judge(found).items() if not entry["ok"]] == [name]


def test_what_was_not_measured_is_not_met() -> None:
    entries = judge({"kernels": {"error": "x"}, "steps": {}, "bandwidth": {}, "parity": {}})
    assert len(entries) == 6
    assert not any(entry["ok"] for entry in entries.values())


def test_union_of_spans() -> None:
    assert union([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.6)]) == 5.0
    assert union([]) == 0.0


def test_idle_moments_within_a_step_are_not_the_hosts() -> None:
    assert DeviceTime.of([(5e6, 7e6), (0.0, 2e6), (1e6, 3e6)]) == DeviceTime(7.0, 2.0)


def test_more_time_is_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[float] = []
    monkeypatch.setattr(gpu_check, "SECTIONS", {"steps": ("x:y", 30.0), "bandwidth": ("x:y", 10.0)})
    monkeypatch.setattr(gpu_check, "run_apart", lambda name, options, limit_s: given.append(limit_s) or {})
    monkeypatch.setattr(gpu_check, "versions", lambda device: {})
    options = argparse.Namespace(tiny=True, apart=True, total_s=120.0, sections=["steps", "bandwidth"])
    options.out = tmp_path / "found.json"
    gpu_check.run_all(options)
    assert given == [90.0, 30.0]
    options.total_s = 35.0
    given.clear()
    gpu_check.run_all(options)
    assert given[0] == 30.0


def test_where_answers_part_a_tie_is_told_from_an_error() -> None:
    truth = Truth([1], [4, 5, 6, 7], [0.5, 0.001, 0.2, 0.2])
    assert compare([4, 5, 6, 7], truth, 0.03) == {"ok": True, "equal": 4}
    assert compare([4, 9, 9, 9], truth, 0.03)["ok"] is True
    assert compare([4, 5, 9, 7], truth, 0.03) == {"ok": False, "equal": 2, "of": 4, "gap": 0.2}


def test_drafts_of_the_parity_section_hold_true_tokens() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    longest = 0
    for _ in range(50):
        tokens, parents = draft(rng, 3, [10, 11, 12], 12)
        assert len(set(zip(parents, tokens, strict=True))) == len(tokens)
        node, length = 0, 0
        for token in (10, 11, 12):
            child = [n for n in range(1, len(tokens)) if parents[n] == node and tokens[n] == token]
            if not child:
                break
            node, length = child[0], length + 1
        longest = max(longest, length)
    assert longest == 3


def test_it_needs_no_server() -> None:
    """On a GPU machine there are torch, triton, transformers and numba, and not what the HTTP side needs."""
    names = ["gpu_check", "gpu_kernels", "gpu_steps", "gpu_generate", "gpu_parity"]
    script = "import sys, " + ", ".join(f"tests.bench.{name}" for name in names)
    script += "\nprint(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"server", "drafters", "msgspec", "uvicorn", "pytest"} & set(eval(done.stdout))


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path / "x.json")])
    assert "no CUDA device here" in capsys.readouterr().err
