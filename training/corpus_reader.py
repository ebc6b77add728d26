"""Reading corpus files as documents or dialogues, one at a time: .txt and .jsonl, plain or compressed (gzip, xz)."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from drafters.ngram.table import TableError

Messages = list[dict[str, Any]]
Render = Callable[[Messages], str]
_T = TypeVar("_T")

PIECE_CHARS = 1 << 16
"""A text without document marks is cut at a line end after this many characters, so that memory stays bounded."""
MAX_LINE_BYTES = 1 << 26
"""Longer lines are taken as several: those of a text go on, those of a .jsonl are malformed."""
_MAX_REPORTED = 20


@dataclass(slots=True)
class CorpusStats:
    """What happened while stats. Owns the counts; one per build."""

    num_documents: int = 0
    num_bytes: int = 0
    """Compressed bytes consumed so far, for a progress bar."""
    num_malformed: int = 0
    malformed: list[str] = field(default_factory=list)
    """The first malformed lines as "file:line: reason"."""

    def add_malformed(self, path: Path, line: int, reason: str) -> None:
        """Count one line that could not be used."""
        self.num_malformed += 1
        if len(self.malformed) < _MAX_REPORTED:
            self.malformed.append(f"{path}:{line}: {reason}")


def check_names(paths: Sequence[Path]) -> None:
    """Refuse files whose kind cannot be told, before any work is done. Raises: TableError."""
    for path in paths:
        if not path.is_file():
            raise TableError(f"{path}: no such file")
        if _kind(path) not in (".txt", ".jsonl"):
            raise TableError(f"{path}: a corpus file is .txt or .jsonl, also with .gz or .xz behind it")


def read_documents(path: Path, render: Render, separator: str, stats: CorpusStats) -> Iterator[str]:
    """The documents of one file.

    Args: `render` turns chat messages into text; `separator` parts the documents of a text file.
    Malformed lines are counted in `stats` and left out. Raises: TableError when the file cannot be decompressed, or
    is a text that is not UTF-8: read as something else than it is, it would teach the table nonsense.
    """

    def text_of(row: Any) -> str:
        content = _row_content(row)
        return content if isinstance(content, str) else render(content)

    yield from _read(path, text_of, separator, stats)


def read_dialogues(path: Path, separator: str, stats: CorpusStats) -> Iterator[str | Messages]:
    """The documents of one file with their chats as they are; all else as `read_documents`."""
    yield from _read(path, _row_content, separator, stats)


def _read(path: Path, shape: Callable[[Any], str | _T], separator: str, stats: CorpusStats) -> Iterator[str | _T]:
    """Texts of a text file, or whatever `shape` makes of the rows of a .jsonl file; empty ones are left out."""
    before = stats.num_bytes
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            lines = _lines(stream, raw, stats)
            if _kind(path) == ".jsonl":
                yield from _jsonl_documents(path, lines, shape, stats)
            else:
                yield from _text_documents(_decoded(path, lines), separator, stats)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise TableError(f"{path}: cannot read: {error}") from error
    stats.num_bytes = before + path.stat().st_size


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".xz") else path.suffix


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    return lzma.LZMAFile(raw) if path.suffix == ".xz" else raw


def _lines(stream: IO[bytes], raw: IO[bytes], stats: CorpusStats) -> Iterator[bytes]:
    before = stats.num_bytes
    # A file without line ends must not be read whole: readline takes a limit.
    while line := stream.readline(MAX_LINE_BYTES):
        stats.num_bytes = before + raw.tell()
        yield line


def _decoded(path: Path, lines: Iterator[bytes]) -> Iterator[str]:
    """Lines as text; a long one may come in pieces that end within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = 0
    for line in chain(lines, [b""]):
        num_held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(line, final=not line)
        except UnicodeDecodeError as error:
            place = num_bytes - num_held + error.start
            raise TableError(f"{path}: not UTF-8 at byte {place} ({error.reason}): convert it first") from None
        num_bytes += len(line)


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
    path: Path, lines: Iterator[bytes], shape: Callable[[Any], str | _T], stats: CorpusStats
) -> Iterator[str | _T]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = shape(json.loads(line))
            # No tokenizer takes a lone surrogate.
            (content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).encode()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            stats.add_malformed(path, number, str(error) or type(error).__name__)
            continue
        if not isinstance(content, str) or content.strip():
            stats.num_documents += 1
            yield content


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
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
        if not isinstance(message.get("content"), str):
            raise ValueError("a message whose content is not a string")
    return value


def join_messages(messages: Messages) -> str:
    """Chat text for a model without a chat template."""
    return "\n".join(str(message["content"]) for message in messages)
