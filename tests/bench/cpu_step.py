"""Time of one step on a CPU: the verifier plain and with quick modules, transformers' own model beside it.

    python -m tests.bench.cpu_step --shape 15m [--dtype bfloat16] [--threads 2] [--rounds 10] [--compiled-peer 1 8 64]
                                   [--llama-bench PROGRAM --gguf FILE]

Random weights; drafts of 1 to 64 nodes behind `--context` tokens. All arms in one process with the same number of
threads, interleaved: every round goes through all sizes and, within a size, through all arms, a burst of steps each,
of which the first warms the caches and is not counted. llama.cpp, where given, runs as a program of its own before and
after. Medians and minima in milliseconds; x tf is transformers' eager time at the same draft over the arm's, x 1 the
arm's own time over its time at one node. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.bench.random_model import SHAPES, make
from tests.bench.step_arms import Arm, Draft, Ours, make_draft, theirs_compiled, theirs_eager
from verifier.cpu.threads import use_threads
from verifier.options import VerifierOptions

OURS: dict[str, dict[str, bool]] = {"plain": {}, "quick": {"is_compiled": True}}
BASE = "tf-eager"
_PATHOLOGICAL = 4.0
"""A compiled peer that is so many times slower than the eager one is told, and left out of the rounds."""


@dataclass
class Record:
    """What was measured. Owned by the run."""

    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Seconds of the counted steps, by arm and draft."""
    won: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    """Cores that others kept busy, by round."""


class CpuWatch:
    """CPU seconds of everybody but this process, from the kernel's own counts."""

    def __init__(self) -> None:
        self._last = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        user, nice, system, _, _, irq, softirq, steal = fields
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, sum(own[:4])

    def cores(self) -> float:
        """Cores that others kept busy since the last call, other machines on this one included."""
        now, last = self._read(), self._last
        self._last = now
        return ((now[1] - last[1]) - (now[2] - last[2])) / max(now[0] - last[0], 1e-9)


def build_arms(options: argparse.Namespace, folder: str, prompt: list[int], record: Record) -> list[Arm]:
    """Every arm with weights of its own, as a process that runs it alone would have."""
    shared = {
        "model": folder,
        "dtype": options.dtype,
        "device": "cpu",
        "threads": options.threads,
        "max_rows": 1,
        "max_model_len": len(prompt) + 128,
    }
    arms: list[Arm] = []
    for name, special in OURS.items():
        if name not in options.arms:
            continue
        began = time.monotonic()
        arm = Ours(name, VerifierOptions(**shared, **special), prompt)
        record.notes.append(f"{name}: ready after {time.monotonic() - began:.1f} s")
        arms.append(arm)
    dtype = getattr(torch, options.dtype)
    arms.append(theirs_eager(folder, dtype, prompt))
    if options.compiled_peer:
        arms.append(theirs_compiled(folder, dtype, prompt))
    return arms


def make_drafts(options: argparse.Namespace, arm: Ours, vocab_size: int) -> list[Draft]:
    """Chains of all sizes, trees of those where a tree is something else."""
    truth, rng = arm.decode(6), np.random.default_rng(1)
    drafts = [make_draft("chain", size, truth, rng, vocab_size) for size in options.nodes]
    if options.trees:
        drafts += [make_draft("tree", size, truth, rng, vocab_size) for size in options.nodes if size > 3]
    return drafts


def one_step(arm: Arm, draft: Draft) -> tuple[float, list[int]]:
    arm.prepare(draft)
    torch.set_num_threads(arm.torch_threads)
    began = time.perf_counter()
    result = arm.step()
    seconds = time.perf_counter() - began
    arm.restore(draft)
    return seconds, arm.won(draft, result)


def warm_up(options: argparse.Namespace, arms: list[Arm], drafts: list[Draft], record: Record) -> set[tuple[str, str]]:
    """Every arm once through every draft; returns what is left out of the rounds."""
    skipped: set[tuple[str, str]] = set()
    eager: dict[str, float] = {}
    for arm in arms:
        is_late = False
        for draft in drafts:
            key = (arm.name, draft.label)
            is_wanted = draft.kind == "chain" and draft.size in options.compiled_peer
            if arm.name == "tf-compiled" and (is_late or not is_wanted):
                skipped.add(key)
                continue
            began = time.monotonic()
            _, won = one_step(arm, draft)
            first_s = time.monotonic() - began
            record.won.setdefault(draft.label, {})[arm.name] = won
            seconds = min(one_step(arm, draft)[0] for _ in range(3))
            if arm.name == BASE:
                eager[draft.label] = seconds
            if arm.name != "tf-compiled":
                continue
            record.notes.append(f"tf-compiled at {draft.label}: compiled in {first_s:.1f} s")
            if first_s > options.compile_limit:
                record.notes.append(f"tf-compiled: over {options.compile_limit} s to compile; larger drafts left out")
                is_late = True
            if seconds > _PATHOLOGICAL * eager[draft.label]:
                slow = f"{seconds * 1e3:.1f} ms, {seconds / eager[draft.label]:.1f} times eager"
                record.notes.append(f"tf-compiled at {draft.label}: {slow}; left out")
                skipped.add(key)
    return skipped


def measure(options: argparse.Namespace, arms: list[Arm], drafts: list[Draft], record: Record) -> None:
    skipped = warm_up(options, arms, drafts, record)
    watch = CpuWatch()
    for number in range(options.rounds):
        for draft in drafts:
            for place in range(len(arms)):
                arm = arms[(place + number) % len(arms)]
                if (arm.name, draft.label) in skipped:
                    continue
                seconds = [one_step(arm, draft)[0] for _ in range(options.burst)]
                record.times.setdefault(arm.name, {}).setdefault(draft.label, []).extend(seconds[1:])
        record.foreign.append(watch.cores())


def llama_bench(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a batch of n tokens behind the context, by n, by llama.cpp's own program."""
    sizes = ",".join(str(size) for size in options.nodes)
    command = [options.llama_bench, "-m", options.gguf, "-p", sizes, "-n", "0", "-d", str(options.context)]
    command += ["-t", str(options.threads), "-r", "15", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return {str(row["n_prompt"]): row["avg_ns"] / 1e6 for row in json.loads(done.stdout)}


def summary(record: Record, labels: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By arm and draft: median and minimum in ms, and both ratios."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_draft in record.times.items():
        for label in labels:
            if label not in by_draft:
                continue
            median = statistics.median(by_draft[label])
            cell = {"ms": median * 1e3, "min_ms": min(by_draft[label]) * 1e3, "steps": len(by_draft[label])}
            if label in record.times[BASE]:
                cell["x_tf"] = statistics.median(record.times[BASE][label]) / median
            if "1" in by_draft:
                cell["x_1"] = median / statistics.median(by_draft["1"])
            table.setdefault(name, {})[label] = {key: round(value, 3) for key, value in cell.items()}
    return table


def report(table: dict[str, dict[str, dict[str, float]]], labels: list[str]) -> None:
    print("ms median (min), x tf, x 1; 8t is a tree of 8 nodes")
    print(f"{'arm':>12} " + " ".join(f"{label:>26}" for label in labels))
    for name, row in table.items():
        cells = []
        for label in labels:
            cell = row.get(label)
            if cell is None:
                cells.append(f"{'-':>26}")
                continue
            text = f"{cell['ms']:.2f} ({cell['min_ms']:.2f})"
            text += "".join(f" {cell[key]:.2f}" if key in cell else " -" for key in ("x_tf", "x_1"))
            cells.append(f"{text:>26}")
        print(f"{name:>12} " + " ".join(cells))


def run(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    use_threads(options.threads)
    transformers.logging.disable_progress_bar()
    record = Record()
    rng = np.random.default_rng(0)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    prompt: list[int] = rng.integers(3, config.vocab_size, options.context).tolist()
    peer = [llama_bench(options)] if options.llama_bench else []
    arms = build_arms(options, folder, prompt, record)
    first = arms[0]
    assert isinstance(first, Ours)
    drafts = make_drafts(options, first, config.vocab_size)
    measure(options, arms, drafts, record)
    if options.llama_bench:
        peer.append(llama_bench(options))
    labels = [draft.label for draft in drafts]
    table = summary(record, labels)
    report(table, labels)
    for row in peer:
        print(f"{'llama.cpp':>12} " + " ".join(f"{size}: {ms:.2f}" for size, ms in row.items()))
    differing = {label: by_arm for label, by_arm in record.won.items() if len(set(map(tuple, by_arm.values()))) > 1}
    foreign = {"mean": round(statistics.mean(record.foreign), 3), "most": round(max(record.foreign), 3)}
    for line in (*record.notes, f"foreign cores: mean {foreign['mean']}, most in a round {foreign['most']}"):
        print(line)
    for label, by_arm in differing.items():
        print(f"{label}: not the same tokens won: {by_arm}")
    return {
        "bench": "cpu_step",
        "model": Path(options.model).name if options.model else options.shape,
        "dtype": options.dtype,
        "threads": options.threads,
        "context": options.context,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foreign_cores": foreign,
        "arms": table,
        "llama_bench_ms": peer,
        "not_the_same": sorted(differing),
        "notes": record.notes,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="15m", choices=sorted(SHAPES))
    parser.add_argument("--model", default="", help="a folder in place of random weights of --shape")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(OURS), choices=list(OURS), help="which of ours")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--trees", action=argparse.BooleanOptionalAction, default=True, help="trees beside chains")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--burst", type=int, default=4, help="steps in a row of one arm; the first is not counted")
    parser.add_argument(
        "--compiled-peer", type=int, nargs="*", default=[1, 8, 64], help="sizes to compile transformers for; or none"
    )
    parser.add_argument("--compile-limit", type=float, default=60.0, help="seconds for one of them")
    parser.add_argument("--llama-bench", default="", help="llama.cpp's program; without it llama.cpp is left out")
    parser.add_argument("--gguf", default="", help="the same weights for --llama-bench")
    options = parser.parse_args()
    if bool(options.llama_bench) != bool(options.gguf):
        parser.error("--llama-bench and --gguf go together")
    if options.burst < 2 or options.rounds < 1:
        parser.error("--burst must be at least 2 and --rounds at least 1")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or str(make(Path(made), options.shape, options.dtype))
        print(json.dumps(run(options, folder)))


if __name__ == "__main__":
    main()
