"""The decoders of the tokenizers library as filters: text leaves as soon as nothing that follows can change it.

A decoder of the library reads all pieces of a text at once. Here each one is a filter over pieces that come one by
one, and filters are chained as the tokenizer's file chains decoders. The text is the library's, however the tokens
arrive, but for two places where the library loses what a reader wants. A run of byte tokens is read character by
character: the library makes a whole run U+FFFD for one bad byte. An added token is ordinary text: the library reads
its letters as byte codes.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tokenizers import Regex, decoders

from server.errors import StartupError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_TEXT_AT_START = re.compile(r"(\^|\\A)([^\\^$.|?*+()\[\]{}\n]+)")
"""A pattern that stands for one fixed text at the start of a line, or of all text."""


class Filter(ABC):
    """One decoder. A piece is one `open`, any number of `write`, one `close`; `finish` comes behind the last.

    Owns what it has not passed on to `out` yet.
    """

    is_local = False
    """Whether what becomes of a piece hangs on that piece alone."""

    def __init__(self, out: Filter):
        self.out = out

    def open(self) -> None:
        """A piece begins."""
        self.out.open()

    @abstractmethod
    def write(self, text: str) -> None:
        """More of the open piece."""

    def close(self) -> None:
        """The piece ends."""
        self.out.close()

    def finish(self) -> None:
        """No piece follows."""
        self.out.finish()

    def middle(self, text: str) -> str:
        """What a whole piece becomes when others stand before and behind it."""
        return text


class Sink(Filter):
    """The end of a chain. Owns the text that nobody has taken yet."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def open(self) -> None:
        """Pieces are joined as they are."""

    def write(self, text: str) -> None:
        """Keep the text for `take`."""
        self._parts.append(text)

    def close(self) -> None:
        """Pieces are joined as they are."""

    def finish(self) -> None:
        """Nothing is held here."""

    def take(self) -> str:
        """The text since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text


class _Local(Filter):
    """A filter of which each piece is a new beginning."""

    is_local = True

    def middle(self, text: str) -> str:
        """The same as anywhere; asked only of a filter that writes into a sink."""
        assert isinstance(self.out, Sink), "this filter is in use"
        self.open()
        self.write(text)
        self.close()
        return self.out.take()


class Fuse(Filter):
    """Makes all pieces one, with a separator between them."""

    def __init__(self, out: Filter, separator: str = ""):
        super().__init__(out)
        self._separator = separator
        self._is_open = False

    def open(self) -> None:
        """Only the first piece opens anything."""
        if self._is_open:
            self.out.write(self._separator)
        else:
            self._is_open = True
            self.out.open()

    def write(self, text: str) -> None:
        """Pass it on."""
        self.out.write(text)

    def close(self) -> None:
        """The one piece stays open."""

    def finish(self) -> None:
        """Now the one piece ends."""
        if self._is_open:
            self.out.close()
        self.out.finish()

    def middle(self, text: str) -> str:
        """The separator belongs to the piece behind it."""
        return self._separator + text


class Strip(_Local):
    """Takes up to `start` characters `content` off the start of each piece and up to `stop` off its end."""

    def __init__(self, out: Filter, *, content: str, start: int, stop: int):
        super().__init__(out)
        self._content, self._start, self._stop = content, start, stop
        self._num_left = 0
        self._held = ""

    def open(self) -> None:
        """A new piece has a new start."""
        self._num_left = self._start
        self.out.open()

    def write(self, text: str) -> None:
        """Drop what stands at the start, hold what may stand at the end."""
        while self._num_left and text.startswith(self._content):
            text = text[1:]
            self._num_left -= 1
        if text:
            self._num_left = 0
        text = self._held + text
        num_held = 0
        while num_held < min(self._stop, len(text)) and text[-1 - num_held] == self._content:
            num_held += 1
        cut = len(text) - num_held
        self._held = text[cut:]
        self.out.write(text[:cut])

    def close(self) -> None:
        """What is held did stand at the end."""
        self._held = ""
        self.out.close()


class Metaspace(Filter):
    """Makes a mark a space. In the first piece it makes it nothing, if the encoder has put it there."""

    def __init__(self, out: Filter, *, mark: str, drops_first: bool):
        super().__init__(out)
        self._mark = mark
        self._spaces = ["", " "] if drops_first else [" "]
        self._space = ""

    def open(self) -> None:
        """The first piece is over when the next one opens."""
        self._space = self._spaces[0]
        self._spaces = self._spaces[-1:]
        self.out.open()

    def write(self, text: str) -> None:
        """Replace the marks."""
        self.out.write(text.replace(self._mark, self._space))

    def middle(self, text: str) -> str:
        """A space for each mark."""
        return text.replace(self._mark, " ")


class ReplaceText(_Local):
    """Puts `new` in the place of `old`. Holds what may be the beginning of `old`."""

    def __init__(self, out: Filter, *, old: str, new: str):
        super().__init__(out)
        self._old, self._new = old, new
        self._held = ""

    def write(self, text: str) -> None:
        """Replace what is complete."""
        *done, rest = (self._held + text).split(self._old)
        num_held = min(len(self._old) - 1, len(rest))
        while not self._old.startswith(rest[len(rest) - num_held :]):
            num_held -= 1
        cut = len(rest) - num_held
        self._held = rest[cut:]
        self.out.write(self._new.join([*done, rest[:cut]]))

    def close(self) -> None:
        """What is held stays as it is."""
        self.out.write(self._held)
        self._held = ""
        self.out.close()


class ReplaceAtStart(_Local):
    """Puts `new` in the place of `old` where a piece begins, or where a line does."""

    def __init__(self, out: Filter, *, old: str, new: str, in_lines: bool):
        super().__init__(out)
        self._old, self._new, self._in_lines = old, new, in_lines
        self._is_start = True
        self._held = ""

    def open(self) -> None:
        """A piece begins, and a line with it."""
        self._is_start = True
        self.out.open()

    def write(self, text: str) -> None:
        """Look at each start as soon as its text is long enough."""
        text = self._held + text
        self._held = ""
        while text:
            if self._is_start and len(text) < len(self._old) and self._old.startswith(text):
                self._held = text
                return
            if self._is_start and text.startswith(self._old):
                self.out.write(self._new)
                text = text[len(self._old) :]
            line, newline, rest = text.partition("\n") if self._in_lines else (text, "", "")
            self.out.write(line + newline)
            self._is_start = bool(newline)
            text = rest

    def close(self) -> None:
        """What is held stays as it is."""
        self.out.write(self._held)
        self._held = ""
        self.out.close()


class _Whole(Filter):
    """A filter that looks at whole pieces. Owns the piece that is not complete."""

    def __init__(self, out: Filter):
        super().__init__(out)
        self._parts: list[str] = []

    def open(self) -> None:
        """Nothing is passed on before the piece is complete."""

    def write(self, text: str) -> None:
        """Collect it."""
        self._parts.append(text)

    def close(self) -> None:
        """The piece is complete."""
        piece = "".join(self._parts)
        self._parts.clear()
        self.take(piece)

    @abstractmethod
    def take(self, piece: str) -> None:
        """Pass on what `piece` becomes."""

    def pass_on(self, piece: str) -> None:
        """One whole piece."""
        self.out.open()
        self.out.write(piece)
        self.out.close()


class ReplacePattern(_Whole):
    """Asks the library, whose regular expressions are not Python's."""

    is_local = True

    def __init__(self, out: Filter, *, pattern: str, new: str):
        super().__init__(out)
        self._decoder = decoders.Replace(Regex(pattern), new)

    def take(self, piece: str) -> None:
        """Replace in all of it."""
        self.pass_on(self.middle(piece))

    def middle(self, text: str) -> str:
        """Every match is replaced."""
        return str(self._decoder.decode([text]))


class WordPiece(_Whole):
    """Puts a space before every piece that begins a word, but not before the first."""

    def __init__(self, out: Filter, *, prefix: str, cleanup: bool):
        super().__init__(out)
        self._decoder = decoders.WordPiece(prefix, cleanup)
        self._is_first = True

    def take(self, piece: str) -> None:
        """The first piece is told from the others."""
        self.pass_on(str(self._decoder.decode([piece])) if self._is_first else self.middle(piece))
        self._is_first = False

    def middle(self, text: str) -> str:
        """The library is shown a piece before it, and cleans each piece by itself."""
        return str(self._decoder.decode(["x", text]))[1:]


class EndOfWord(_Whole):
    """Makes a suffix a space, but nothing in the last piece: a piece is held from the suffix on."""

    def __init__(self, out: Filter, *, suffix: str):
        super().__init__(out)
        self._suffix = suffix
        self._held: str | None = None

    def open(self) -> None:
        """The piece before was not the last."""
        self._release(" ")

    def take(self, piece: str) -> None:
        """Pass on the text before the suffix."""
        text, suffix, rest = piece.partition(self._suffix)
        self.out.open()
        self.out.write(text)
        self._held = suffix + rest

    def finish(self) -> None:
        """The piece before was the last."""
        self._release("")
        self.out.finish()

    def _release(self, space: str) -> None:
        if self._held is not None:
            self.out.write(self._held.replace(self._suffix, space))
            self.out.close()
            self._held = None

    def middle(self, text: str) -> str:
        """A space for each suffix."""
        return text.replace(self._suffix, " ")


class Ctc(_Whole):
    """Drops a piece that repeats the one before it, and padding."""

    def __init__(self, out: Filter, *, pad_token: str, word_delimiter_token: str, cleanup: bool):
        super().__init__(out)
        self._decoder = decoders.CTC(pad_token, word_delimiter_token, cleanup)
        self._last: str | None = None

    def take(self, piece: str) -> None:
        """Compare it with the last one."""
        if piece != self._last:
            self._last = piece
            self.pass_on(self.middle(piece))

    def middle(self, text: str) -> str:
        """The piece by itself."""
        return str(self._decoder.decode([text]))


class Bytes(_Whole):
    """Reads bytes as UTF-8. Owns the bytes of the character that is not complete."""

    def __init__(self, out: Filter, read: Callable[[str], str | bytes]):
        super().__init__(out)
        self.read = read
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_open = False

    def take(self, piece: str) -> None:
        """Read a piece that comes from another filter."""
        self.take_spelled(self.read(piece))

    def take_spelled(self, piece: str | bytes) -> None:
        """Bytes in a row are one piece, which a text ends."""
        if isinstance(piece, str):
            self._end()
            self.pass_on(piece)
            return
        if not self._is_open:
            self._is_open = True
            self.out.open()
        self.out.write(self._decoder.decode(piece))

    def finish(self) -> None:
        """A character that is not complete by now never will be."""
        self._end()
        self.out.finish()

    def middle(self, text: str) -> str:
        """The characters, as far as the piece holds whole ones."""
        piece = self.read(text)
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            self.out.write(self._decoder.decode(b"", final=True))
            self._decoder.reset()
            self.out.close()


class Decoding:
    """How ids become text by the `decoder` of a tokenizer.json.

    `is_late` tells that a regular expression is applied to all of the text, which therefore comes at its end.
    """

    def __init__(self, decoder: dict[str, Any] | None):
        """Raises StartupError for a decoder that is not known."""
        makers = list(_makers(decoder))
        filters = [make(Sink()) for make in makers]
        num_local = next((index for index, one in enumerate(filters) if not one.is_local), len(filters))
        self._local = filters[:num_local]
        self._makers = makers[num_local:]
        rest = filters[num_local:]
        # Where pieces are joined, the ends of a piece are not those of a token.
        joined = next((index for index, one in enumerate(rest) if isinstance(one, Fuse | Bytes)), len(rest))
        self._rest = [*rest[:joined], *(one for one in rest[joined:] if not isinstance(one, Strip | ReplaceAtStart))]
        self.is_late = any(isinstance(one, ReplacePattern) for one in rest[joined:])
        self._bytes = rest[0] if rest and isinstance(rest[0], Bytes) else None

    def spell(self, token: str, *, is_added: bool) -> str | bytes:
        """What enters a chain for a token: its text, or its bytes where it stands for bytes."""
        for one in self._local:
            token = one.middle(token)
        if self._bytes is None:
            return token
        if is_added and self._bytes.read is _read_letters:
            return token.encode()
        return self._bytes.read(token)

    def middle(self, spelled: str | bytes) -> bytes:
        """The bytes of a spelled token in the middle of a text."""
        if isinstance(spelled, bytes):
            return spelled
        for one in self._rest:
            spelled = one.middle(spelled)
        return spelled.encode()

    def chain(self) -> tuple[Callable[[str | bytes], None], Filter, Sink]:
        """For one text: what takes spelled tokens, what is told of the end, and where the text comes out."""
        sink = Sink()
        first: Filter = sink
        for make in reversed(self._makers):
            first = make(first)
        if isinstance(first, Bytes):
            return first.take_spelled, first, sink
        return partial(_whole_piece, first), first, sink


def _whole_piece(first: Filter, piece: str | bytes) -> None:
    assert isinstance(piece, str), "only a chain that begins with bytes is given bytes"
    first.open()
    first.write(piece)
    first.close()


def _makers(decoder: dict[str, Any] | None) -> Iterator[Callable[[Filter], Filter]]:
    """One maker of a filter for each decoder, in order."""
    if decoder is None:
        yield partial(Fuse, separator=" ")
        return
    kind = decoder.get("type")
    if kind == "Sequence":
        for part in decoder["decoders"]:
            yield from _makers(part)
    elif kind == "ByteLevel":
        yield partial(Bytes, read=_read_letters)
    elif kind == "ByteFallback":
        yield partial(Bytes, read=_read_byte_token)
    elif kind == "Fuse":
        yield Fuse
    elif kind == "Strip":
        yield partial(Strip, content=decoder["content"], start=decoder["start"], stop=decoder["stop"])
    elif kind == "Replace":
        yield _replace(decoder["pattern"], decoder["content"])
    elif kind == "Metaspace":
        drops_first = decoder.get("prepend_scheme", "always") != "never"
        yield partial(Metaspace, mark=decoder["replacement"], drops_first=drops_first)
    elif kind == "WordPiece":
        yield partial(WordPiece, prefix=decoder["prefix"], cleanup=decoder["cleanup"])
    elif kind == "BPEDecoder" and decoder["suffix"]:
        yield partial(EndOfWord, suffix=decoder["suffix"])
    elif kind == "CTC":
        yield partial(Ctc, **{name: value for name, value in decoder.items() if name != "type"})
    else:
        raise StartupError(f"tokenizer.json has a decoder of the type {kind!r}, which is not known")


def _replace(pattern: dict[str, str], new: str) -> Callable[[Filter], Filter]:
    old = pattern.get("String")
    if old:
        return partial(ReplaceText, old=old, new=new)
    regex = pattern["Regex"] if "Regex" in pattern else re.escape(old or "")
    if match := _TEXT_AT_START.fullmatch(regex):
        # In the library's expressions ^ is the start of any line.
        return partial(ReplaceAtStart, old=match[2], new=new, in_lines=match[1] == "^")
    return partial(ReplacePattern, pattern=regex, new=new)


def _read_byte_token(text: str) -> str | bytes:
    """The byte of a token like <0x0A>; any other text stays text."""
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes((int(match[1], 16),)) if match else text


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes: printable Latin-1 for itself, the others from U+0100 on (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_LETTERS = _byte_letters()


def _read_letters(text: str) -> bytes:
    """The bytes that letters stand for; a text with any other letter is itself."""
    try:
        return bytes([_LETTERS[letter] for letter in text])
    except KeyError:
        return text.encode()
