"""What the ablations decode: targets, held-out prompts for them, and the documents that their tables are built from.

Needs the shared models and texts (FORETOKEN_SHARED, else ../shared); the demo model itself comes with the project.
"""

from __future__ import annotations

import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from server import demo

SHARED = Path(os.environ.get("FORETOKEN_SHARED") or Path(__file__).resolve().parents[3] / "shared")
END = "<|endoftext|>"
_HELD = 50
"""One chat row in this many is held out, chosen by its first message as in the training of the dialogue models."""

Messages = list[dict[str, str]]
Documents = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Task:
    """A target, prompts for it, and documents for its table."""

    model: str
    folder: Path
    prompts: list[list[int]]
    documents: Documents
    """Reads and encodes the training texts: slow."""
    vocab: dict[str, int]
    max_tokens: int
    stop_id: int


def read(name: str) -> str:
    """A text of the shared corpora."""
    with lzma.open(SHARED / "corpora" / name, "rt") as file:
        return str(file.read())


def stories(prompts: int) -> Task:
    """tiny1m: beginnings of held-out stories, 32 to 64 tokens."""
    folder = SHARED / "models/tiny1m"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encoded(part: str) -> list[list[int]]:
        text = read(f"tinystories_subset-{part}.txt.xz")
        documents = [piece.strip() for piece in text.split(END) if piece.strip()]
        return [[1, *found.ids] for found in tokenizer.encode_batch(documents, add_special_tokens=False)]

    held = [tokens for tokens in encoded("valid") if len(tokens) >= 150][:prompts]
    cut = [tokens[: 32 + index * 7 % 33] for index, tokens in enumerate(held)]
    return Task("tiny1m", folder, cut, lambda: encoded("train"), tokenizer.get_vocab(), 192, 2)


def dialogues(prompts: int, model: str = "booking5m") -> Task:
    """booking5m or demo: held-out dialogues up to their middle user turn."""
    folder = demo.MODEL if model == "demo" else SHARED / "models" / model
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = list(chats())
    held = [row for row in rows if is_held(row)]
    chosen = []
    for row in held[:: max(1, len(held) // prompts)][:prompts]:
        turns = user_turns(row)
        chosen.append(row[: turns[len(turns) // 2] + 1])

    def encoded(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]

    def documents() -> list[list[int]]:
        return encoded([render(row) for row in rows if not is_held(row)])

    asked = encoded([render_prompt(row) for row in chosen])
    return Task(model, folder, asked, documents, tokenizer.get_vocab(), 128, 4)


TASKS: dict[str, Callable[[int], Task]] = {
    "tiny1m": stories,
    "booking5m": dialogues,
    "demo": lambda prompts: dialogues(prompts, "demo"),
}
"""By name of the target; each takes how many prompts to choose."""


def chats() -> Iterator[Messages]:
    """The task dialogues of the shared corpora."""
    for name in ("sgd", "taskmaster4"):
        for line in read(f"chat-{name}.jsonl.xz").splitlines():
            yield json.loads(line)["messages"]


def is_held(row: Messages) -> bool:
    """Whether the dialogue models never saw this dialogue."""
    return zlib.crc32(row[0]["content"].encode()) % _HELD == 0


def user_turns(row: Messages) -> list[int]:
    """Where the user speaks."""
    return [index for index, message in enumerate(row) if message["role"] == "user"]


def render(row: Messages) -> str:
    """A dialogue in the chat format of the dialogue models."""
    return END + "".join(f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in row)


def render_prompt(row: Messages) -> str:
    """A dialogue that the assistant is to go on with."""
    return render(row) + "<|assistant|>\n"
