"""Prompts that people compare speculation on: Spec-Bench's six tasks, HumanEval, GSM8K's test part. Chosen by a seed.

Nothing is asked twice: Spec-Bench's mathematics are questions of GSM8K, so `read_tasks` drops from a task what an
earlier one has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.commands.bench_prompts import Prompt

SPEC_BENCH = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")
TASKS = (*SPEC_BENCH, "humaneval", "gsm8k")
_CHAT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-bench's categories: Spec-Bench's first task is MT-bench. Of its two turns the first is asked."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and the task that it is from."""

    task: str
    prompt: Prompt


Group = list[Question]
"""One question of each task."""


def read_tasks(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The texts of these tasks, in the order of TASKS, none of them twice.

    Args: `folder` holds Spec-Bench's question.jsonl; beside it lie humaneval/HumanEval.jsonl and gsm8k/test.jsonl.
    Raises: SystemExit that names the missing or broken file.
    """
    found: dict[str, list[str]] = {name: [] for name in TASKS}
    for row in _rows(folder / "question.jsonl"):
        category = str(row["category"])
        found["chat" if category in _CHAT else category].append(str(row["turns"][0]))
    beside: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "humaneval": ("humaneval/HumanEval.jsonl", lambda row: str(row["prompt"])),
        "gsm8k": ("gsm8k/test.jsonl", lambda row: str(row["question"])),
    }
    for name in beside.keys() & set(names):
        file, text_of = beside[name]
        found[name] = [text_of(row) for row in _rows(folder.parent / file)]
    return {name: texts for name, texts in without_repeats(found).items() if name in names}


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"--prompts: {file}: {getattr(error, 'strerror', None) or error}") from error


def without_repeats(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each text only where it comes first; blanks make no difference."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name, found in texts.items():
        kept[name] = []
        for text in found:
            key = " ".join(text.split())
            if key not in seen:
                seen.add(key)
                kept[name].append(text)
    return kept


def deal(texts: Mapping[str, Sequence[str]], num_groups: int, seed: int, shape: Callable[..., Prompt]) -> list[Group]:
    """`num_groups` groups of one question of each task, in an order that the seed fixes. More groups change none.

    Args: `shape` makes a prompt of a task's name and a text. Raises: SystemExit if a task has too few.
    """
    orders: dict[str, list[str]] = {}
    for name, found in texts.items():
        if len(found) < num_groups:
            raise SystemExit(f"--tasks {name}: {len(found)} prompts, {num_groups} are needed: none is asked twice")
        orders[name] = list(found)
        random.Random(f"{seed} {name}").shuffle(orders[name])
    return [[Question(name, shape(name, orders[name][index])) for name in orders] for index in range(num_groups)]


def shaper(completions: Sequence[str], cut_chars: int) -> Callable[[str, str], Prompt]:
    """Asks the tasks of `completions` as plain texts, all others as a user's turn; 0 characters cut nothing."""

    def shape(task: str, text: str) -> Prompt:
        cut = text[:cut_chars] if cut_chars else text
        return Prompt((), cut) if task in completions else Prompt((("user", cut),), "")

    return shape


def rounds_of(groups: Sequence[Group], num_rounds: int) -> list[list[Question]]:
    """The groups dealt over rounds as evenly as they go; each round is a list of questions, its tasks mixed.

    Raises: SystemExit if a round would be empty.
    """
    if len(groups) < num_rounds:
        raise SystemExit(f"--rounds {num_rounds}: more than the {len(groups)} prompts of a task")
    return [[question for group in groups[first::num_rounds] for question in group] for first in range(num_rounds)]
