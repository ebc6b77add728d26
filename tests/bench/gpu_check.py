"""Is it right and is it fast on this GPU? One script, one JSON, in the time that it is given.

    python -m tests.bench.gpu_check --out FILE [--sections kernels bandwidth steps generate parity] [--total-s 470]
    TRITON_INTERPRET=1 python -m tests.bench.gpu_check --out FILE --dry-run   the same logic on a CPU

Where no kernel was compiled yet, `kernels` spends most of its time on compiling: give it more, or run it twice, as
Triton keeps what it compiled. `--dry-run` needs Triton 3.9, or NumPy before 2.4.

Sections: `kernels` compares every kernel with its oracle, `bandwidth` its time with the bytes it reads, `steps` times
whole steps of random-weight models and the host's part in them, `generate` sets transformers beside them, `parity`
compares answers with transformers' own. Each runs in a process of its own with a time limit of its own; one that fails
or is cut short leaves a line and what it had found. The JSON is written after each; a table and the criteria come last,
and the exit status says whether all of them are met.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from tests.bench.gpu_report import judge, table
from tests.bench.gpu_room import Room, first_line

ROOT = Path(__file__).resolve().parents[2]
SECTIONS: dict[str, tuple[str, float]] = {
    "kernels": ("tests.bench.gpu_kernels:check_kernels", 65.0),
    "bandwidth": ("tests.bench.gpu_kernels:time_kernels", 65.0),
    "steps": ("tests.bench.gpu_steps:time_steps", 150.0),
    "generate": ("tests.bench.gpu_generate:time_generate", 95.0),
    "parity": ("tests.bench.gpu_parity:check_parity", 90.0),
}
"""What runs, and its share of the time: seconds at most, start of its process included, where all have 470."""
_MARGIN_S = 10.0
"""So long before its limit a section begins nothing new; at it, it is interrupted; so long after it, killed."""
_LEAST_S = 20.0
"""With less time than this a section is not begun."""


class OutOfTime(BaseException):
    """The section did not stop by itself; nobody but its caller may take it for a finding."""


class Keeper(logging.Handler):
    """Keeps what the verifier warns of among a section's findings: what could not be compiled or recorded, and why."""

    def __init__(self, room: Room) -> None:
        super().__init__(logging.WARNING)
        self._room = room

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._room.list("warnings")) < 20:
            self._room.add("warnings", record.getMessage()[:300])


def run_here(name: str, room: Room) -> None:
    """Run a section in this process; whatever it raises becomes a line of its findings."""
    module, function = SECTIONS[name][0].split(":")
    transformers.logging.disable_progress_bar()

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime("interrupted at its limit")

    keeper = Keeper(room)
    logging.getLogger("verifier").addHandler(keeper)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, room.left_s + _MARGIN_S))
    try:
        section: Callable[[Room], None] = getattr(importlib.import_module(module), function)
        section(room)
    except (Exception, OutOfTime) as error:
        room.found["error"] = first_line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        logging.getLogger("verifier").removeHandler(keeper)
        room.save()


def run_apart(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run a section in a process of its own: a fault of the device ends that one alone. Returns its findings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, "-m", "tests.bench.gpu_check", "--section", name, "--out", str(path)]
        ends = time.monotonic() + limit_s - _MARGIN_S
        command += ["--deadline", str(ends), *(["--tiny"] if options.tiny else [])]
        log = Path(folder) / "log"
        with log.open("w") as out:
            child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
            try:
                child.wait(limit_s + _MARGIN_S)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if child.returncode:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
            found.setdefault("error", f"ended with status {child.returncode}: {' | '.join(last)}"[:500])
    return found


def versions(device: str) -> dict[str, str]:
    known = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    if importlib.util.find_spec("triton") is not None:
        known["triton"] = str(importlib.import_module("triton").__version__)
    known["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return known


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """All sections, one after the other, each with what is left of the time; the report is written after each."""
    began = time.monotonic()
    device = "cpu" if options.tiny else "cuda"
    share = max(1.0, options.total_s / sum(SECTIONS[name][1] for name in options.sections))
    report: dict[str, Any] = {"bench": "gpu_check", "is_tiny": options.tiny, **versions(device), "sections": {}}
    for name in options.sections:
        limit_s = min(SECTIONS[name][1] * share, options.total_s - (time.monotonic() - began))
        started = time.monotonic()
        if limit_s < _LEAST_S:
            found: dict[str, Any] = {"error": "no time left for it"}
        elif options.apart:
            found = run_apart(name, options, limit_s)
        else:
            room = Room(device, options.tiny, time.monotonic() + limit_s - _MARGIN_S)
            run_here(name, room)
            found = room.found
        found["wall_s"] = round(time.monotonic() - started, 1)
        report["sections"][name] = found
        report["wall_s"] = round(time.monotonic() - began, 1)
        report["criteria"] = judge(report["sections"])
        options.out.write_text(json.dumps(report))
        print(f"{name}: {found['wall_s']} s {found.get('error', '')}", file=sys.stderr, flush=True)
    return report


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON is written")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--total-s", type=float, default=470.0, help="seconds for all sections, shared out among them")
    parser.add_argument(
        "--tiny", "--dry-run", action="store_true", help="small shapes on a CPU, with TRITON_INTERPRET=1"
    )
    parser.add_argument(
        "--apart", action=argparse.BooleanOptionalAction, help="processes of their own; not with --tiny"
    )
    parser.add_argument("--section", default="", choices=["", *SECTIONS], help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.apart is None:
        options.apart = not options.tiny
    if options.tiny and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--tiny needs TRITON_INTERPRET=1 in the environment")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny runs the same logic on a CPU")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.section:
        device = "cpu" if options.tiny else "cuda"
        run_here(options.section, Room(device, options.tiny, options.deadline, options.out))
        return 0
    report = run_all(options)
    print(table(report))
    short = {key: report[key] for key in ("bench", "device", "is_tiny", "wall_s", "criteria")}
    print(json.dumps({**short, "out": str(options.out)}))
    return 0 if all(entry["ok"] for entry in report["criteria"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
