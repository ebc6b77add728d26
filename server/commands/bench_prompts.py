"""Prompt files of the bench client: what people have lying about, made into request bodies."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from server.config import SettingsError

CHAT, COMPLETIONS = "chat", "completions"
PATHS = {CHAT: "/chat/completions", COMPLETIONS: "/completions"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `messages` for the chat route, else `text` for the completions route."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs; empty for a plain text."""
    text: str

    @property
    def endpoint(self) -> str:
        """Which route asks it."""
        return CHAT if self.messages else COMPLETIONS

    def body(self, salt: str = "") -> dict[str, Any]:
        """The fields of a request that carry the prompt; a salt goes in front of it, so that no cache knows it."""
        if not self.messages:
            return {"prompt": salt + self.text}
        first, *rest = self.messages
        pairs = [(first[0], salt + first[1]), *rest]
        return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def read_prompts(path: str, endpoint: str = "auto", cut_chars: int = 0) -> list[Prompt]:
    """All prompts of a file, plain or .gz or .xz.

    A .txt file holds one prompt a line. A .jsonl file holds objects with one of `prompt` (asked as a completion),
    `messages` (up to the last user turn), `turns` (the first is asked, as in MT-bench) or `question`. `endpoint`
    "chat" or "completions" asks all of them that way; `cut_chars` keeps the first characters of a plain text only.
    Raises SettingsError with file and line.
    """
    file = Path(path)
    prompts: list[Prompt] = []
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    prompts.append(_shape(_parse(file, number, line), endpoint, cut_chars))
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not prompts:
        raise SettingsError(f"{path}: no prompts in it")
    return prompts


def _open(file: Path) -> TextIO:
    openers = {".gz": gzip.open, ".xz": lzma.open}
    opener: Any = openers.get(file.suffix, open)
    return cast("TextIO", opener(file, "rt", encoding="utf-8"))


def _parse(file: Path, number: int, line: str) -> Prompt:
    if ".jsonl" not in file.suffixes:
        return Prompt((), line.rstrip("\n"))
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}:{number}: not JSON ({error})") from error
    if isinstance(row, dict):
        for found in _candidates(row):
            return found
    raise SettingsError(f"{file}:{number}: expected an object with prompt, messages, turns or question")


def _candidates(row: dict[str, Any]) -> Iterator[Prompt]:
    prompt, turns, messages = row.get("prompt"), row.get("turns"), row.get("messages")
    if isinstance(prompt, str) and prompt:
        yield Prompt((), prompt)
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        pairs = [(str(message.get("role")), str(message.get("content"))) for message in messages]
        while pairs and pairs[-1][0] != "user":
            pairs.pop()
        if pairs:
            yield Prompt(tuple(pairs), "")
    if isinstance(turns, list) and turns and isinstance(turns[0], str):
        yield Prompt((("user", turns[0]),), "")
    if isinstance(row.get("question"), str) and row["question"]:
        yield Prompt((("user", row["question"]),), "")


def _shape(prompt: Prompt, endpoint: str, cut_chars: int) -> Prompt:
    text = prompt.text[:cut_chars] if cut_chars else prompt.text
    if endpoint == CHAT and not prompt.messages:
        return Prompt((("user", text),), "")
    if endpoint == COMPLETIONS and prompt.messages:
        joined = "\n".join(content for _, content in prompt.messages)
        return Prompt((), joined[:cut_chars] if cut_chars else joined)
    return Prompt(prompt.messages, text)
