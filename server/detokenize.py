"""Token ids to text, as they come: never half a character, nothing that could still become a stop string.

The text of a whole answer is what `tokenizers` gives for it in one call; each token is looked at once. Byte-level and
byte-fallback decoders are followed byte by byte; any other decoder is asked again for a short window of tokens.
"""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_WINDOW = 6
"""Tokens of left context that a decoder without a byte rule is shown again."""
_TAIL = 8
"""Undecodable tokens that are held: far more than a character has bytes, so nothing before them can still change."""
_REPLACEMENT = "\ufffd"


class TokenText:
    """What each token of one vocabulary stands for. Owns a cache of at most one entry per token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._hidden = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._rule = _read_rule(json.loads(tokenizer.to_str()).get("decoder"))
        self._letters = _byte_letters() if self._rule.kind == "byte-level" else {}
        self._pieces: dict[int, bytes | int | None] = {}

    def reader(self, prompt: Sequence[int] = ()) -> Reader:
        """Reads one answer. With a `prompt` the answer continues its text: no space is stripped at the seam."""
        if self._rule.kind == "byte-level":
            return _ByteReader(self)
        tail = [token for token in prompt[-_WINDOW * 4 :] if self.piece(token) is not None][-_WINDOW:]
        if self._rule.kind == "byte-fallback":
            return _FallbackReader(self, strips=self._rule.strips and not tail)
        return _WindowReader(self, self._tokenizer, tail, is_local=self._rule.is_local)

    def piece(self, token: int) -> bytes | int | None:
        """The text of a token in UTF-8, or the number of the single byte it stands for; None is not shown at all."""
        try:
            return self._pieces[token]
        except KeyError:
            piece = self._pieces[token] = None if token in self._hidden else self._spell(token)
            return piece

    def spell(self, token: int) -> bytes:
        """The bytes of a token by itself, for a list of log-probabilities; special tokens by their names."""
        piece = self._spell(token)
        if isinstance(piece, int):
            return bytes((piece,))
        return piece or b""

    def _spell(self, token: int) -> bytes | int | None:
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._hidden:
            return None if text is None else text.encode()
        if self._rule.kind == "byte-level":
            letters = [self._letters.get(letter, -1) for letter in text]
            return text.encode() if -1 in letters else bytes(letters)
        if self._rule.kind == "window":
            return str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()
        for pattern, content in self._rule.replaces:
            text = text.replace(pattern, content)
        byte = _byte_of(text)
        return text.encode() if byte is None else byte


class Reader(ABC):
    """Reads one answer. Owns what is not certain yet."""

    @abstractmethod
    def feed(self, tokens: Sequence[int]) -> str:
        """Text that became certain with these tokens."""

    @abstractmethod
    def finish(self) -> str:
        """The rest, now that nothing follows."""


class _ByteReader(Reader):
    """Byte-level vocabularies: bytes in a row, decoded as they complete characters."""

    def __init__(self, text: TokenText):
        self._piece = text.piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        pieces = [self._piece(token) for token in tokens]
        return self._decoder.decode(b"".join([piece for piece in pieces if type(piece) is bytes]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _FallbackReader(Reader):
    """Vocabularies with <0x..> tokens: a run of them is text only if all of it is UTF-8, so it is held to its end."""

    def __init__(self, text: TokenText, *, strips: bool):
        self._piece = text.piece
        self._run = bytearray()
        self._strips = strips

    def feed(self, tokens: Sequence[int]) -> str:
        out: list[str] = []
        for token in tokens:
            piece = self._piece(token)
            if type(piece) is int:
                self._run.append(piece)
            elif type(piece) is bytes:
                if self._run:
                    out.append(self._end_run())
                out.append(piece.decode())
        return self._strip("".join(out))

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _strip(self, text: str) -> str:
        """The decoder takes one space off the start of the whole text."""
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class _WindowReader(Reader):
    """Any other decoder: decode a window with and without the new tokens, and take the difference.

    Text that ends in U+FFFD may be half a character and is held; of a long run of it all but the last few tokens are
    certain where the decoder `is_local`.
    """

    def __init__(self, text: TokenText, tokenizer: Tokenizer, tail: Sequence[int], *, is_local: bool):
        self._text = text
        self._tokenizer = tokenizer
        self._is_local = is_local
        self._context = list(tail)
        self._new: list[int] = []

    def feed(self, tokens: Sequence[int]) -> str:
        self._new.extend(token for token in tokens if self._text.piece(token) is not None)
        if not self._new:
            return ""
        whole = self._tokenizer.decode(self._context + self._new)
        if not whole.endswith(_REPLACEMENT):
            return self._advance(whole)
        return self._advance_part(whole) if self._is_local and len(self._new) >= 2 * _TAIL else ""

    def finish(self) -> str:
        return self._advance(self._tokenizer.decode(self._context + self._new)) if self._new else ""

    def _advance(self, whole: str) -> str:
        known = len(self._tokenizer.decode(self._context)) if self._context else 0
        self._context = (self._context + self._new)[-_WINDOW:]
        self._new = []
        return whole[known:]

    def _advance_part(self, whole: str) -> str:
        """Let go of all but the last tokens, if the text is the same when the rest is read by itself."""
        head, tail = self._new[:-_TAIL], self._new[-_TAIL:]
        certain = self._tokenizer.decode(self._context + head)
        context = (self._context + head)[-_WINDOW:]
        rest = self._tokenizer.decode(context + tail)[len(self._tokenizer.decode(context)) :]
        if certain + rest != whole:
            return ""
        self._new = head
        text = self._advance(certain)
        self._new = tail
        return text


class Detokenizer:
    """The text of one answer, and where it stops. Owns the reader and the text that is held back.

    `num_tokens` counts the tokens of the answer up to the one that completed a stop string; `length` is the number of
    characters known so far, held ones included.
    """

    def __init__(self, reader: Reader, stop: tuple[str, ...] = (), *, keeps_stop: bool = False, min_tokens: int = 0):
        self._reader = reader
        self._stop = stop
        self._keeps_stop = keeps_stop
        self._min_tokens = min_tokens
        self._prefixes = frozenset(text[:end] for text in stop for end in range(1, len(text)))
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.num_tokens = 0
        self.length = 0
        self.is_stopped = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Text to send now. After a stop string `is_stopped` is true and further tokens are not counted."""
        if not self._stop:
            self.num_tokens += len(tokens)
            text = self._reader.feed(tokens)
            self.length += len(text)
            return text
        out: list[str] = []
        for token in tokens:
            if self.is_stopped:
                break
            self.num_tokens += 1
            out.append(self._take(self._reader.feed((token,))))
        return "".join(out)

    def count(self, num_tokens: int) -> None:
        """Count tokens that are not part of the text, such as a stop token."""
        self.num_tokens += num_tokens

    def finish(self) -> str:
        """The rest of the text; a stop string may show up only here."""
        if self.is_stopped:
            return ""
        text = self._reader.finish()
        if not self._stop:
            self.length += len(text)
            return text
        text = self._take(text)
        if self.is_stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _take(self, text: str) -> str:
        if not text:
            return ""
        self.length += len(text)
        if self.num_tokens <= self._min_tokens:
            return text
        held = self._held + text
        found = [(start, -len(stop)) for stop in self._stop if (start := held.find(stop)) >= 0]
        if found:
            start, size = min(found)
            self.is_stopped = True
            self._held = ""
            cut = start - size if self._keeps_stop else start
            self.length -= len(held) - cut
            return held[:cut]
        for size in range(min(self._longest - 1, len(held)), 0, -1):
            if held[-size:] in self._prefixes:
                self._held = held[-size:]
                return held[:-size]
        self._held = ""
        return held


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a decoder works: "byte-level", "byte-fallback" after replacements, or "window" for any other."""

    kind: str
    replaces: tuple[tuple[str, str], ...] = ()
    strips: bool = False
    """One space is taken off the start of the whole text."""
    is_local: bool = True
    """Whether a token's text hangs on its neighbours alone. A run of byte fallback is text or not as a whole."""


def _read_rule(decoder: dict[str, Any] | None) -> _Rule:
    """The rule of the `decoder` in tokenizer.json."""
    if decoder is None:
        return _Rule("window")
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return _Rule("byte-level")
    replaces: list[tuple[str, str]] = []
    while kinds and kinds[0] == "Replace" and isinstance(text := parts[0]["pattern"].get("String"), str):
        replaces.append((text, parts[0]["content"]))
        kinds, parts = kinds[1:], parts[1:]
    if kinds == ["ByteFallback", "Fuse"]:
        return _Rule("byte-fallback", tuple(replaces))
    if kinds == ["ByteFallback", "Fuse", "Strip"]:
        strip = parts[2]
        if (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0):
            return _Rule("byte-fallback", tuple(replaces), strips=True)
    return _Rule("window", is_local="ByteFallback" not in json.dumps(decoder))


def _byte_of(text: str) -> int | None:
    """The byte that a token like <0x0A> stands for."""
    if len(text) != 6 or not text.startswith("<0x") or not text.endswith(">"):
        return None
    try:
        return int(text[3:5], 16)
    except ValueError:
        return None


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes: printable Latin-1 for itself, the others from U+0100 on (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
