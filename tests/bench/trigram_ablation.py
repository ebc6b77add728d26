"""What each part of the tri-gram drafter is worth: search x corpus x adaptation x learning from verified nodes.

Run: python -m tests.bench.trigram_ablation [--models tiny1m booking5m] [--prompts 100] [--grid-prompts 40] [--lookup]
Greedy, fp32, one thread, one request at a time, all requests of one tenant. Acceptance length is tokens won per verify
step, the target's own one included; a tree's nodes include its root. Needs the shared models and texts
(FORETOKEN_SHARED, else ../shared). Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from drafters.base import Drafter
from drafters.ngram.source import REQUEST, TENANT, NgramFiles
from tests.bench.decoding import Decoder, decode_all
from tests.bench.mcts import MctsDrafter, Published
from tests.bench.tasks import SHARED, TASKS, Task
from tests.drafting import make_view
from training.ngram_table import BuildOptions, build_table

TARGETS = {"tiny1m": {8: 2.7, 16: 3.0, 64: 3.9}, "booking5m": {8: 2.6, 16: 2.9, 64: 3.8}}


@dataclass(frozen=True)
class Arm:
    """A configuration of the n-gram source."""

    vocab_size: int
    table: str = ""
    is_published: bool = False
    """Whether trees are made by the paper's search, four tokens deep as published or eight."""
    depth: int = 4
    exploration: float = 0.0
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Other values of drafters.ngram.source."""

    def make(self) -> Drafter:
        """A fresh drafter."""
        files = NgramFiles(table=self.table)
        view = make_view(
            "trigram", self.vocab_size, max_rows=1, files=files, exploration=(self.exploration, 0.0), **self.constants
        )
        return MctsDrafter(view.drafter, Published(depth=self.depth)) if self.is_published else view


def measure(task: Task, decoder: Decoder, arm: Arm, max_nodes: int, prompts: int) -> dict[str, Any]:
    """Acceptance length over the prompts, the drafter's own expectation, and a checksum of the answers."""
    tally, answers = decode_all(decoder, task.prompts[:prompts], arm.make(), max_nodes)
    return tally.summary() | {"answers_crc": zlib.crc32(json.dumps(answers).encode())}


def tables(task: Task, folder: Path) -> dict[str, str]:
    """The table with contexts of two tokens only, and the default one."""
    made = {"none": ""}
    documents = task.documents()
    for name, min_long_count in (("tri-grams", 0), ("+4-grams", 2)):
        out = folder / f"{task.model}-{min_long_count}.tri"
        options = BuildOptions(out=out, tokenizer=task.model, min_long_count=min_long_count)
        info = build_table(options, task.vocab, documents)
        made[name] = str(out)
        size = out.stat().st_size / 2**20
        print(f"  table {name}: {info.num_tokens} tokens, {info.num_entries} entries, {size:.1f} MiB")
    return made


def adapted(base: Arm, layers: str, is_shown: bool) -> Arm:
    """The arm with only the named caches, with or without learning from verified nodes."""
    constants = {}
    for name, appetite in (("REQUEST", REQUEST), ("TENANT", TENANT)):
        is_used = name.lower() in layers
        constants[name] = replace(
            appetite,
            committed_orders=appetite.committed_orders if is_used else (),
            verified_orders=appetite.verified_orders if is_used and is_shown else (),
        )
    return replace(base, constants=constants)


def headlines(base: Arm, made: dict[str, str]) -> Iterator[tuple[str, Arm]]:
    """The configurations measured at every tree size."""
    best = replace(base, table=made["+4-grams"])
    yield "default", best
    for weight in (0.1, 0.3, 1.0):
        yield f"exploration bonus {weight}", replace(best, exploration=weight)
    yield "default, tenant caches off", adapted(best, "request", True)
    yield "default, no verified nodes", adapted(best, "request+tenant", False)
    yield "tri-gram table, adaptive", replace(base, table=made["tri-grams"])
    yield "static, 4-grams", adapted(best, "none", False)
    yield "static, tri-grams", adapted(replace(base, table=made["tri-grams"]), "none", False)
    yield "published search and constants", replace(best, is_published=True)
    yield "published search, depth 8", replace(best, is_published=True, depth=8)


def grid(base: Arm, made: dict[str, str]) -> Iterator[tuple[str, Arm]]:
    """Search x corpus x adaptation x learning from verified nodes."""
    for search in ("best-first", "published"):
        for corpus, path in made.items():
            for layers in ("none", "request", "tenant", "request+tenant"):
                for is_shown in (False, True) if layers != "none" else (False,):
                    if corpus == "none" and layers == "none":
                        continue
                    arm = replace(base, is_published=search == "published", depth=8, table=path)
                    name = f"{search:10} | {corpus:9} | {layers:14} | {'yes' if is_shown else 'no':3}"
                    yield name, adapted(arm, layers, is_shown)


def lookup(task: Task, prompts: int) -> float:
    """Acceptance length of prompt lookup in transformers (prompt_lookup_num_tokens=10)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, trust_remote_code=False)
    calls = won = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    for prompt in task.prompts[:prompts]:
        limit = min(task.max_tokens, model.config.max_position_embeddings - len(prompt))
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, prompt_lookup_num_tokens=10,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long), pad_token_id=0,
        )  # fmt: skip
        calls -= 1  # the first call is the prompt's, and gives the first token
        won += found.shape[1] - len(prompt) - 1
    return won / calls


def run(task: Task, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    print(f"\n{task.model}: {len(task.prompts)} prompts of {np.mean([len(p) for p in task.prompts]):.0f} tokens")
    decoder = Decoder(task)
    made = tables(task, folder)
    base = Arm(decoder.geometry.vocab_size)
    found: dict[str, Any] = {"headlines": {}, "grid": {}}
    print(f"\n| {task.model} | 8 nodes | 16 nodes | 64 nodes | calibration |\n|---|---|---|---|---|")
    for name, arm in headlines(base, made):
        cells = {size: measure(task, decoder, arm, size, arguments.prompts) for size in (8, 16, 64)}
        found["headlines"][name] = cells
        shown = " | ".join(f"{cell['acceptance_length']:.2f}" for cell in cells.values())
        print(f"| {name} | {shown} | {cells[16]['calibration']:.2f} |", flush=True)
    texts = {cell["answers_crc"] for cells in found["headlines"].values() for cell in cells.values()}
    print(f"| (targets) | {' | '.join(f'{value:.2f}' for value in TARGETS[task.model].values())} | |")
    print(f"answers of all runs are {'the same' if len(texts) == 1 else f'NOT the same: {len(texts)} versions'}")
    found["num_versions"] = len(texts)
    if arguments.lookup:
        found["prompt_lookup"] = round(lookup(task, arguments.prompts), 3)
        print(f"prompt lookup of transformers, 10 tokens: {found['prompt_lookup']:.2f}")
    if arguments.grid_prompts:
        print("\n| search | corpus | layers | verified nodes | 16 nodes |\n|---|---|---|---|---|")
        for name, arm in grid(base, made):
            cell = measure(task, decoder, arm, 16, arguments.grid_prompts)
            found["grid"][name] = cell["acceptance_length"]
            print(f"| {name} | {cell['acceptance_length']:.2f} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--grid-prompts", type=int, default=40, help="prompts of the full grid; 0 leaves it out")
    parser.add_argument("--lookup", action="store_true", help="measure prompt lookup too")
    arguments = parser.parse_args()
    if not (SHARED / "models").is_dir():
        parser.exit(2, f"no shared models in {SHARED}: name the folder in FORETOKEN_SHARED\n")
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(TASKS[name](arguments.prompts), arguments, Path(folder)) for name in arguments.models}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
