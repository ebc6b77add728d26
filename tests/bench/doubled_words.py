"""Whether speculation doubles words: answers of the demo model through the server's loop, with its drafter and without.

Run: python -m tests.bench.doubled_words [--data FILE] [--answers 500] [--rows 4] [--temperatures 0 0.7 1.2]
       [--drafter D] [--ctc-head DIR] [--max-nodes 16] [--threads 1]
A doubled word is a sign that a drafter's tree was not what the target read. Prompts are held-out task dialogues up to
each of their user turns (FORETOKEN_SHARED, else ../shared), or those of FILE, one {"messages": [...]} a line; answer i
has seed i, and the temperatures take turns. Prints the counts of both; the last line is JSON. Exit code 1 if the
counts, or any of the texts, differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from drafters import PLAIN
from server import demo
from server.config import Settings
from server.errors import StartupError
from server.messages import Speculation, Submit
from server.worker.main import load
from tests.bench.tasks import SHARED, Messages, chats, is_held, render_prompt, user_turns
from verifier.plan import SamplingParams

_STOP_ID = 4
_DOUBLED = {
    "word": re.compile(r"\b(\w+)\s+\1\b", re.IGNORECASE),
    "comma or period": re.compile(r"([,.])\s*\1"),
    "chunk": re.compile(r"([A-Za-z]{4,})\1", re.IGNORECASE),
}


def doubled(text: str) -> list[str]:
    """The kinds of doubling that a text has: a word said twice, a comma or period, a chunk of 4 letters or more."""
    return [kind for kind, pattern in _DOUBLED.items() if pattern.search(text)]


@dataclass(slots=True)
class Arm:
    """What one drafter came to. Owns its answers, by number."""

    drafter: str
    answers: list[list[int]]
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_drafter_failures: int = 0
    seconds: float = 0.0

    def summary(self, texts: Sequence[str]) -> dict[str, Any]:
        """Its counts; `texts` are those of the answers."""
        kinds = [doubled(text) for text in texts]
        return {
            "drafter": self.drafter,
            "answers": len(texts),
            "tokens": sum(len(answer) for answer in self.answers),
            "steps": self.num_steps,
            "drafted": self.num_drafted,
            "accepted": self.num_accepted,
            "drafter_failures": self.num_drafter_failures,
            "doubled": sum(bool(found) for found in kinds),
            **{f"doubled_{kind.replace(' ', '_')}": sum(kind in found for found in kinds) for kind in _DOUBLED},
            "seconds": round(self.seconds, 1),
        }


def run(settings: Settings, submits: Sequence[Submit], drafter: str) -> Arm:
    """All requests at once through a freshly loaded worker. Raises: StartupError."""
    loop = load(settings).loop
    arm = Arm(drafter, [[] for _ in submits])
    began = time.perf_counter()
    for submit in submits:
        loop.handle(submit)
    while loop.has_work:
        outcome = loop.step()
        assert not outcome.errors, outcome.errors
        for delta in outcome.deltas:
            arm.answers[int(delta.id)] += delta.tokens
        if outcome.stats is not None:
            arm.num_steps += 1
            arm.num_drafted += outcome.stats.num_draft_tokens
            arm.num_accepted += outcome.stats.num_accepted
            arm.num_drafter_failures += outcome.stats.num_drafter_failures
    arm.seconds = time.perf_counter() - began
    return arm


def asks_of(rows: Iterable[Messages], limit: int, room: int, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Prompts that end with a user turn and have at most `room` tokens, spread evenly over all of the dialogues."""
    texts = [render_prompt(row[: turn + 1]) for row in rows for turn in user_turns(row)]
    found = [tuple(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    found = [prompt for prompt in found if len(prompt) <= room]
    return [found[index * len(found) // limit] for index in range(limit)] if len(found) > limit else found


def dialogues(data: str) -> Iterable[Messages]:
    """Those of a file, or the held-out ones."""
    if not data:
        return (row for row in chats() if is_held(row))
    return (json.loads(line)["messages"] for line in Path(data).read_text(encoding="utf-8").splitlines() if line)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both arms, counted; prints what differs. Raises: StartupError."""
    tokenizer = Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))
    settings = settings_of(arguments)
    context = json.loads((demo.MODEL / "config.json").read_text())["max_position_embeddings"]
    prompts = asks_of(dialogues(arguments.data), arguments.answers, context - arguments.max_tokens, tokenizer)

    def submits(drafter: str) -> list[Submit]:
        speculation = Speculation(drafter, 1 if drafter == PLAIN else settings.max_nodes)
        heats = arguments.temperatures
        return [
            Submit(
                str(index),
                prompt,
                SamplingParams(
                    max_tokens=arguments.max_tokens,
                    seed=index,
                    temperature=heats[index % len(heats)],
                    stop_ids=(_STOP_ID,),
                ),
                speculation,
                "bench",
            )
            for index, prompt in enumerate(prompts)
        ]

    arms = [run(settings, submits(drafter), drafter) for drafter in (settings.drafter, PLAIN)]
    texts = [tokenizer.decode_batch(arm.answers) for arm in arms]
    different = [
        index for index, (mine, plain) in enumerate(zip(*(arm.answers for arm in arms), strict=True)) if mine != plain
    ]
    for index in different[:10]:
        print(f"answer {index} differs:\n  {settings.drafter}: {texts[0][index]!r}\n  {PLAIN}: {texts[1][index]!r}")
    examples = [text for text in texts[1] if doubled(text)][:3]
    return {
        "arms": [arm.summary(found) for arm, found in zip(arms, texts, strict=True)],
        "different": len(different),
        "temperatures": arguments.temperatures,
        "max_nodes": settings.max_nodes,
        "examples": examples,
    }


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What `foretoken serve` takes without a model, but for what was asked for."""
    settings = Settings(**demo.defaults())  # type: ignore[arg-type]
    settings = replace(
        settings,
        device="cpu",
        threads=arguments.threads,
        max_num_seqs=arguments.rows,
        max_nodes=arguments.max_nodes or settings.max_nodes,
        drafter=arguments.drafter or settings.drafter,
        ctc_head=arguments.ctc_head or settings.ctc_head,
    )
    if settings.drafter == PLAIN:
        raise StartupError(f"--drafter {PLAIN} is what the other one is compared with")
    return settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="", help="dialogues instead of the held-out ones")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4, help="requests that run at once: they share the nodes of a step")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.2])
    parser.add_argument("--drafter", default="", help="default: that of the demo server")
    parser.add_argument("--ctc-head", default="", help="default: that of the demo server")
    parser.add_argument("--max-nodes", type=int, default=0, help="0: the server's default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not arguments.data and not (SHARED / "corpora").is_dir():
        parser.exit(2, f"no shared texts in {SHARED}: name the folder in FORETOKEN_SHARED, or a file with --data\n")
    try:
        found = compare(arguments)
    except StartupError as error:
        parser.exit(2, f"{error}\n")
    names = [name for name in found["arms"][0] if name != "drafter"]
    print(f"| drafter | {' | '.join(name.replace('_', ' ') for name in names)} |\n|---|{'---|' * len(names)}")
    for arm in found["arms"]:
        print(f"| {arm['drafter']} | {' | '.join(str(arm[name]) for name in names)} |")
    drafted, plain = (arm["doubled"] for arm in found["arms"])
    print(f"answers with doubled words: {drafted} with {found['arms'][0]['drafter']}, {plain} without speculation")
    print(f"texts that differ: {found['different']}")
    print(json.dumps(found))
    return 1 if drafted != plain or found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
