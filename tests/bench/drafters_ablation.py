"""How many tokens a step wins with each drafter on held-out prompts, through the real verifier.

Run: python -m tests.bench.drafters_ablation --model demo --ctc-head DIR [--table T] [--exploration 0.3 0]
       [--temperatures 0 0.7 1] [--nodes 8 16 64] [--prompts 40] [--drafters trigram ctc hybrid ...]

One thread, float32, one request at a time, all requests of one tenant; prompt i has seed i in every cell, and each cell
begins with nothing learned. Acceptance length is tokens won per verify step, the target's own one included; a tree's
nodes include its root. `ctc-uncoupled` leaves the target's noise out of the ranking (temperature > 0 only).
Without --table the demo model takes its own, other targets get one built from their training texts. Needs the shared
texts (FORETOKEN_SHARED, else ../shared). Prints tables; the last line is JSON; exit code 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from drafters.base import Drafter
from drafters.drafter import EXPLORATION
from drafters.head.files import FileError
from drafters.ngram.table import TableError
from server import demo
from tests.bench.arms import ARMS, SINGLES, Makers
from tests.bench.decoding import Decoder, decode_all
from tests.bench.tasks import SHARED, TASKS, Task
from training.ngram_table import BuildOptions, build_table

Cells = dict[int, dict[str, float]]
"""By most nodes of a tree: the summary of a tally."""


@dataclass(slots=True)
class Comparison:
    """Cells of one temperature. Owns them, and the texts that every one of them must repeat."""

    task: Task
    decoder: Decoder
    temperature: float
    texts: list[list[int]] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    """Answers that are not those of the first cell, as "cell: prompt i at token j"."""

    def measure(self, drafter: Drafter, name: str, max_nodes: int) -> dict[str, Any]:
        """One cell."""
        tally, answers = decode_all(self.decoder, self.task.prompts, drafter, max_nodes, self.temperature)
        self.texts = self.texts or answers
        for index, (mine, first) in enumerate(zip(answers, self.texts, strict=True)):
            if mine != first:
                pairs = zip(mine, first, strict=False)
                place = next((j for j, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(first)))
                self.different.append(f"{name}, {max_nodes} nodes: prompt {index} from token {place} on")
        return tally.summary()


def row_of(name: str, cells: Cells, sizes: list[int]) -> str:
    """A line of the table: acceptance lengths, then mean score / mean acceptance of the drafted nodes."""
    lengths = " | ".join(f"{cells[size]['acceptance_length']:.2f}" for size in sizes)
    means = " | ".join(f"{cells[size]['mean_score']:.3f} / {cells[size]['mean_acceptance']:.3f}" for size in sizes)
    return f"| {name} | {lengths} | {means} |"


def head_of(title: str, sizes: list[int]) -> str:
    """The first lines of the table."""
    names = [f"{size} nodes" for size in sizes] + [f"score / accepted, {size}" for size in sizes]
    return f"\n| {title} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"


def ratios(cells: dict[str, Cells], sizes: list[int]) -> dict[str, dict[int, float]]:
    """Hybrid over the best single drafter, coupled over uncoupled; only of what was measured."""
    found: dict[str, dict[int, float]] = {}
    singles = [name for name in SINGLES if name in cells]

    def length(name: str, size: int) -> float:
        return cells[name][size]["acceptance_length"]

    if "hybrid" in cells and singles:
        found["hybrid / best single"] = {
            size: round(length("hybrid", size) / max(length(name, size) for name in singles), 3) for size in sizes
        }
    if "ctc" in cells and "ctc-uncoupled" in cells:
        found["ctc / ctc-uncoupled"] = {
            size: round(length("ctc", size) / length("ctc-uncoupled", size), 3) for size in sizes
        }
    return found


def compare(
    comparison: Comparison, makers: Makers, names: list[str], sizes: list[int]
) -> tuple[dict[str, Cells], dict[str, dict[int, float]]]:
    """All drafters at one temperature; prints its table. Returns: cells by drafter, and the ratios."""
    temperature = comparison.temperature
    print(head_of(f"{comparison.task.model}, temperature {temperature:g}", sizes))
    cells: dict[str, Cells] = {}
    for name in names:
        if name == "ctc-uncoupled" and temperature == 0.0:
            continue
        if name == "none":  # its trees are bare roots, whatever their bound
            cells[name] = dict.fromkeys(sizes, comparison.measure(makers.make(name), name, 1))
        else:
            cells[name] = {size: comparison.measure(makers.make(name), name, size) for size in sizes}
        print(row_of(name, cells[name], sizes), flush=True)
    found = ratios(cells, sizes)
    for name, by_size in found.items():
        print(f"| {name} | {' | '.join(f'{by_size[size]:.2f}x' for size in sizes)} |{' |' * len(sizes)}")
    return cells, found


def run(arguments: argparse.Namespace, task: Task, makers: Makers, decoder: Decoder) -> dict[str, Any]:
    """The comparison at every temperature."""
    has_head = {"ctc": makers.ctc_head, "ctc-uncoupled": makers.ctc_head}
    names = [name for name in ARMS if name in arguments.drafters and has_head.get(name, True)]
    found: dict[str, Any] = {"cells": {}, "ratios": {}, "different": []}
    for temperature in arguments.temperatures:
        comparison = Comparison(task, decoder, temperature)
        cells, by_name = compare(comparison, makers, names, arguments.nodes)
        found["cells"][f"{temperature:g}"], found["ratios"][f"{temperature:g}"] = cells, by_name
        found["different"] += [f"temperature {temperature:g}, {line}" for line in comparison.different]
    return found


def table_of(task: Task, given: str, folder: Path) -> str:
    """The tri-gram table: the given one, the demo model's, or one built from the task's documents."""
    if given or task.model == "demo":
        return given or str(demo.TRIGRAM_TABLE)
    out = folder / "table.tri"
    options = BuildOptions(out=out, tokenizer=task.model)
    build_table(options, task.vocab, task.documents())
    return str(out)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load what is needed and run the chosen mode. Raises: FileError, TableError."""
    task = TASKS[arguments.model](arguments.prompts)
    if arguments.max_tokens:
        task = replace(task, max_tokens=arguments.max_tokens)
    mean = np.mean([len(prompt) for prompt in task.prompts])
    print(f"{task.model}: {len(task.prompts)} held-out prompts of {mean:.0f} tokens, up to {task.max_tokens} answered")
    decoder = Decoder(task)
    needs_table = {"trigram", "hybrid"} & set(arguments.drafters)
    table = table_of(task, arguments.table, folder) if needs_table else ""
    makers = Makers(
        task.folder, decoder.geometry.vocab_size, decoder.shared_weights, table, arguments.ctc_head,
        tuple(arguments.exploration),
    )  # fmt: skip
    found = run(arguments, task, makers, decoder)
    return {"model": task.model, "prompts": len(task.prompts), "max_tokens": task.max_tokens, **found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=list(TASKS), default="demo")
    parser.add_argument("--ctc-head", type=Path, help="without it ctc is left out and hybrid has no head")
    parser.add_argument("--table", default="", help="corpus table of trigram and hybrid")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.0])
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=0, help="0: the task's own bound on an answer")
    parser.add_argument("--drafters", nargs="+", choices=ARMS, help="default: all that there is a head for")
    parser.add_argument("--exploration", type=float, nargs=2, default=EXPLORATION, help="bonus without, with a head")
    arguments = parser.parse_args()
    if set(arguments.drafters or ()) & {"ctc", "ctc-uncoupled"} and not arguments.ctc_head:
        parser.error("ctc and ctc-uncoupled need --ctc-head")
    arguments.drafters = arguments.drafters or list(ARMS)
    if not (SHARED / "corpora").is_dir():
        parser.exit(2, f"no shared texts in {SHARED}: name the folder in FORETOKEN_SHARED\n")
    return arguments


def main() -> int:
    arguments = parse()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(arguments, Path(folder))
    except (FileError, TableError) as error:
        print(error, file=sys.stderr)
        return 2
    different = found["different"]
    print("\nanswers of all cells are " + ("the same" if not different else f"NOT the same: {len(different)} differ"))
    for line in different[:20]:
        print(f"  {line}")
    print(json.dumps(found))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
