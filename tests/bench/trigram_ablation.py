"""What each part of the tri-gram drafter is worth: search x corpus x adaptation x learning from verified nodes.

Run: python -m tests.bench.trigram_ablation [--models tiny1m booking5m] [--prompts 100] [--grid-prompts 40] [--lookup]
Greedy, fp32, one thread, one request at a time, all requests of one tenant. Acceptance length is tokens won per verify
step, the target's own one included; a tree's nodes include its root. Needs the shared models and texts
(FORETOKEN_SHARED, else ../shared). Prints tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from drafters.base import Drafter, News, RowContext, Verified
from drafters.trigram.corpus import BuildOptions, build_table
from drafters.trigram.drafter import ExploreOptions, TrigramDrafter, TrigramOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.runner import Verifier, VerifierOptions
from verifier.tree import DraftTrees

SHARED = Path(os.environ.get("FORETOKEN_SHARED") or Path(__file__).resolve().parents[3] / "shared")
TARGETS = {"tiny1m": {8: 2.7, 16: 3.0, 64: 3.9}, "booking5m": {8: 2.6, 16: 2.9, 64: 3.8}}
_HELD = 50
"""One chat row in this many is held out, chosen by its first message as in the training of booking5m."""


@dataclass(frozen=True)
class Task:
    """A target, prompts for it, and documents for its table."""

    model: str
    prompts: list[list[int]]
    documents: list[list[int]]
    vocab: dict[str, int]
    max_tokens: int
    stop_id: int


def read(name: str) -> str:
    with lzma.open(SHARED / "corpora" / name, "rt") as file:
        return str(file.read())


def stories(prompts: int) -> Task:
    """Beginnings of held-out stories, 32 to 64 tokens."""
    tokenizer = Tokenizer.from_file(str(SHARED / "models/tiny1m/tokenizer.json"))

    def encoded(part: str) -> list[list[int]]:
        text = read(f"tinystories_subset-{part}.txt.xz")
        documents = [piece.strip() for piece in text.split("<|endoftext|>") if piece.strip()]
        return [[1, *found.ids] for found in tokenizer.encode_batch(documents, add_special_tokens=False)]

    held = [tokens for tokens in encoded("valid") if len(tokens) >= 150][:prompts]
    cut = [tokens[: 32 + index * 7 % 33] for index, tokens in enumerate(held)]
    return Task("tiny1m", cut, encoded("train"), tokenizer.get_vocab(), 192, 2)


def dialogues(prompts: int) -> Task:
    """Held-out dialogues up to their middle user turn."""
    tokenizer = Tokenizer.from_file(str(SHARED / "models/booking5m/tokenizer.json"))
    lines = [line for name in ("sgd", "taskmaster4") for line in read(f"chat-{name}.jsonl.xz").splitlines()]
    rows = [json.loads(line)["messages"] for line in lines]
    is_held = [zlib.crc32(row[0]["content"].encode()) % _HELD == 0 for row in rows]
    held = [row for row, kept in zip(rows, is_held, strict=True) if kept]
    chosen = []
    for row in held[:: max(1, len(held) // prompts)][:prompts]:
        turns = [index for index, message in enumerate(row) if message["role"] == "user"]
        chosen.append(row[: turns[len(turns) // 2] + 1])

    def rendered(row: list[dict[str, str]]) -> str:
        return "<|endoftext|>" + "".join(f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in row)

    def encoded(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    train = [rendered(row) for row, kept in zip(rows, is_held, strict=True) if not kept]
    asked = [rendered(row) + "<|assistant|>\n" for row in chosen]
    return Task("booking5m", encoded(asked), encoded(train), tokenizer.get_vocab(), 128, 4)


class Decoder:
    """Greedy decoding with a drafter. Owns a verifier with one row."""

    def __init__(self, model: str):
        options = VerifierOptions(
            model=str(SHARED / "models" / model),
            dtype="float32",
            device="cpu",
            threads=1,
            max_rows=1,
            kv_cache_gib=0.25,
        )
        self._verifier = Verifier(options)
        self.geometry = self._verifier.geometry
        self._pages = tuple((0, index, index) for index in range(-(-self.geometry.max_model_len // 16)))
        self._trees = DraftTrees.allocate(1)
        self.steps = self.won = 0
        self.score = self.accepted = 0.0

    def answer(self, task: Task, prompt: list[int], drafter: Drafter, max_nodes: int) -> list[int]:
        """One answer; counts steps and the tokens they won."""
        room = self.geometry.max_model_len - len(prompt)
        sampling = SamplingParams(max_tokens=task.max_tokens, seed=0, temperature=0.0)
        start = RowStart(0, tuple(prompt), len(prompt), sampling)
        chunk = Chunk(0, 0, tuple(prompt), True)
        self._trees.clear()
        verdict = self._verifier.run(StepPlan(starts=(start,), pages=self._pages, chunks=(chunk,)), self._trees)
        drafter.start(0, RowContext("bench", tuple(prompt), len(prompt), 0, 0.0, (task.stop_id,)))
        tokens = [int(verdict.tokens[0, 0])]
        self._tell(drafter, tokens, None)
        while len(tokens) < min(room, task.max_tokens) and tokens[-1] != task.stop_id:
            left = min(room, task.max_tokens) - len(tokens)
            slot = TreeSlot(0, len(prompt) + len(tokens) - 1, min(max_nodes, room - len(tokens) + 1))
            tokens += self._step(task, slot, drafter, left)
        drafter.stop(0)
        return tokens

    def _step(self, task: Task, slot: TreeSlot, drafter: Drafter, left: int) -> list[int]:
        self._trees.clear()
        drafter.propose(np.array([0], np.int32), np.array([slot.max_nodes], np.int32), self._trees)
        plan = StepPlan(trees=(slot,))
        verdict = self._verifier.run(plan, self._trees, Wanted(drafter.num_candidates))
        won: list[int] = verdict.tokens[0, : verdict.num_accepted[0] + 1].tolist()[:left]
        if task.stop_id in won:
            won = won[: won.index(task.stop_id) + 1]
        self.steps += 1
        self.won += len(won)
        self.score += float(self._trees.scores[1 : self._trees.num_nodes].sum())
        self.accepted += len(won) - 1
        shown = None
        if verdict.candidates is not None and verdict.candidate_logits is not None:
            shown = Verified(self._trees, 0, verdict.candidates, verdict.candidate_logits)
        self._tell(drafter, won, shown)
        return won

    @staticmethod
    def _tell(drafter: Drafter, tokens: list[int], verified: Verified | None) -> None:
        starts = np.array([0, len(tokens)], np.int32)
        drafter.read(News(np.array([0], np.int32), starts, np.array(tokens, np.int64), verified))


def measure(task: Task, decoder: Decoder, options: TrigramOptions, max_nodes: int, prompts: int) -> dict[str, Any]:
    """Acceptance length over the prompts, the drafter's own expectation, and a checksum of the answers."""
    decoder.steps = decoder.won = 0
    decoder.score = decoder.accepted = 0.0
    drafter = TrigramDrafter(options)
    began = time.perf_counter()
    answers = [decoder.answer(task, prompt, drafter, max_nodes) for prompt in task.prompts[:prompts]]
    return {
        "acceptance_length": round(decoder.won / decoder.steps, 3),
        "calibration": round(decoder.score / max(1.0, decoder.accepted), 2),
        "steps": decoder.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "answers_crc": zlib.crc32(json.dumps(answers).encode()),
    }


def tables(task: Task, folder: Path) -> dict[str, str]:
    """The table with contexts of two tokens only, and the default one."""
    made = {"none": ""}
    for name, min_long_count in (("tri-grams", 0), ("+4-grams", 2)):
        out = folder / f"{task.model}-{min_long_count}.tri"
        options = BuildOptions(
            files=(), out=out, tokenizer=task.model, min_long_count=min_long_count, shows_progress=False
        )
        info = build_table(options, lambda texts: [], task.vocab, token_streams=task.documents).info
        made[name] = str(out)
        size = out.stat().st_size / 2**20
        print(f"  table {name}: {info.num_tokens} tokens, {info.num_entries} entries, {size:.1f} MiB")
    return made


def adapted(base: TrigramOptions, layers: str, is_shown: bool) -> TrigramOptions:
    """The options with only the named layers, with or without learning from verified nodes."""
    request, tenant = base.request, base.tenant
    if not is_shown:
        request, tenant = replace(request, verified=0.0), replace(tenant, verified=0.0)
    if "request" not in layers:
        request = replace(request, slots=0)
    if "tenant" not in layers:
        tenant = replace(tenant, slots=0)
    return replace(base, request=request, tenant=tenant, num_candidates=base.num_candidates if is_shown else 0)


def headlines(base: TrigramOptions, made: dict[str, str]) -> Iterator[tuple[str, TrigramOptions]]:
    """The configurations measured at every tree size."""
    best = replace(base, table=made["+4-grams"])
    yield "default", best
    yield "default, tenant layer off", adapted(best, "request", True)
    yield "default, no verified nodes", adapted(best, "request+tenant", False)
    yield "tri-gram table, adaptive", replace(base, table=made["tri-grams"])
    yield "static, 4-grams", adapted(best, "none", False)
    yield "static, tri-grams", adapted(replace(base, table=made["tri-grams"]), "none", False)
    yield "explore, published constants", replace(best, search="explore")
    yield "explore, depth 8", replace(best, search="explore", explore=ExploreOptions(depth=8))


def grid(base: TrigramOptions, made: dict[str, str]) -> Iterator[tuple[str, TrigramOptions]]:
    """Search x corpus x adaptation x learning from verified nodes."""
    for search in ("best-first", "explore"):
        for corpus, path in made.items():
            for layers in ("none", "request", "tenant", "request+tenant"):
                for is_shown in (False, True) if layers != "none" else (False,):
                    if corpus == "none" and layers == "none":
                        continue
                    options = replace(base, search=search, explore=ExploreOptions(depth=8), table=path)
                    name = f"{search:10} | {corpus:9} | {layers:14} | {'yes' if is_shown else 'no':3}"
                    yield name, adapted(options, layers, is_shown)


def lookup(task: Task, prompts: int) -> float:
    """Acceptance length of prompt lookup in transformers (prompt_lookup_num_tokens=10)."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(SHARED / "models" / task.model, dtype=torch.float32)
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
    decoder = Decoder(task.model)
    made = tables(task, folder)
    base = TrigramOptions(vocab_size=decoder.geometry.vocab_size)
    found: dict[str, Any] = {"headlines": {}, "grid": {}}
    print(f"\n| {task.model} | 8 nodes | 16 nodes | 64 nodes | calibration |\n|---|---|---|---|---|")
    for name, options in headlines(base, made):
        cells = {size: measure(task, decoder, options, size, arguments.prompts) for size in (8, 16, 64)}
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
        for name, options in grid(base, made):
            cell = measure(task, decoder, options, 16, arguments.grid_prompts)
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
    makers = {"tiny1m": stories, "booking5m": dialogues}
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(makers[name](arguments.prompts), arguments, Path(folder)) for name in arguments.models}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
