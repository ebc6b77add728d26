"""Reading corpus files as documents or dialogues, one at a time: .txt and .jsonl, plain or compressed (gzip, xz)."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from server.config import SettingsError

Messages = list[dict[str, Any]]
_T = TypeVar("_T")

PIECE_CHARS = 1 << 16
"""A text without document marks is cut at a line end after this many characters, so that memory stays bounded."""
MAX_LINE_CHARS = 1 << 26
"""Longer lines are taken as several: those of a text go on, those of a .jsonl are malformed."""
_MAX_REPORTED = 20
_TAKEN = ("role", "content", "name")
"""Of a message, as in a request: what is nested in other fields would reach the template unguarded."""


@dataclass(slots=True)
class CorpusStats:
    """What happened while files were read. Owns the counts; one per run."""

    num_documents: int = 0
    num_malformed: int = 0
    malformed: list[str] = field(default_factory=list)
    """The first malformed lines as "file:line: reason"."""


def check_names(paths: Sequence[Path]) -> None:
    """Refuse files whose kind cannot be told, before any work is done. Raises: SettingsError."""
    for path in paths:
        if not path.is_file():
            raise SettingsError(f"--data: {path}: no such file")
        if _kind(path) not in (".txt", ".jsonl"):
            raise SettingsError(f"--data: {path}: a corpus file is .txt or .jsonl, also with .gz or .xz behind it")


def read_documents(
    path: Path, separator: str, stats: CorpusStats, shape: Callable[[Messages], _T]
) -> Iterator[str | _T]:
    """The documents of one file: texts as they are, chats as `shape` makes them.

    Args: `separator` parts the documents of a text file; `shape` may raise ValueError for messages it refuses.
    Empty documents are left out; malformed lines too, which are counted in `stats`. Raises: SettingsError when the file
    cannot be decompressed, or is a text that is not UTF-8: read as something else, it would teach nonsense.
    """
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    # In a .jsonl, bytes that are not UTF-8 spoil their line alone: as lone surrogates, which nothing else can hold.
    errors = "surrogateescape" if _kind(path) == ".jsonl" else "strict"
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors=errors, newline="\n") as file:
            # A file without line ends must not be read whole: readline takes a limit.
            lines = iter(lambda: file.readline(MAX_LINE_CHARS), "")
            if _kind(path) == ".jsonl":
                yield from _jsonl_documents(path, lines, shape, stats)
            else:
                yield from _text_documents(lines, separator, stats)
    except UnicodeDecodeError as error:
        raise SettingsError(f"--data: {path}: not UTF-8 ({error.reason}): convert it first") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise SettingsError(f"--data: {path}: cannot read: {error}") from error


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".xz") else path.suffix


def _text_documents(lines: Iterator[str], separator: str, stats: CorpusStats) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        pieces = line.split(separator) if separator else [line]
        for index, piece in enumerate(pieces):
            if index or size > PIECE_CHARS:
                yield from _finished(held, stats)
                held, size = [], 0
            held.append(piece)
            size += len(piece)
    yield from _finished(held, stats)


def _finished(held: list[str], stats: CorpusStats) -> Iterator[str]:
    text = "".join(held).strip()
    if text:
        stats.num_documents += 1
        yield text


def _jsonl_documents(
    path: Path, lines: Iterator[str], shape: Callable[[Messages], _T], stats: CorpusStats
) -> Iterator[str | _T]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = _row_content(json.loads(line))
            json.dumps(content, ensure_ascii=False).encode()  # no tokenizer takes a lone surrogate
            document = content if isinstance(content, str) else shape(content)
        except (ValueError, RecursionError) as error:
            stats.num_malformed += 1
            if len(stats.malformed) < _MAX_REPORTED:
                stats.malformed.append(f"{path}:{number}: {str(error) or type(error).__name__}")
            continue
        if not isinstance(document, str) or document.strip():
            stats.num_documents += 1
            yield document


def _row_content(row: Any) -> str | Messages:
    """The text or chat of a .jsonl row. Raises: ValueError that says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "messages" in row:
        return _messages(row["messages"])
    if "text" in row:
        return _string(row, "text")
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], list):
            return _messages(row["prompt"]) + _messages(row["completion"])
        return _string(row, "prompt") + _string(row, "completion")
    raise ValueError('neither "text" nor "messages" nor "prompt" with "completion"')


def _string(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f'"{key}" is not a string')
    return str(row[key])


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError("messages are not a list with something in it")
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role.isidentifier():
            raise ValueError("a message without a role of one word")
        if not isinstance(message.get("content"), str):
            raise ValueError("a message whose content is not a string")
    return [{key: str(message[key]) for key in _TAKEN if message.get(key) is not None} for message in value]


def join_messages(messages: Messages) -> str:
    """Chat text for a model without a chat template."""
    return "\n".join(str(message["content"]) for message in messages)
