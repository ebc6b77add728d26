"""Token ids to text, as they come: whole characters at once, and nothing that could still become a stop string.

Text is a function of the ids alone: it does not depend on the pieces in which they arrive. Each token is looked at
once, and what was given out is final.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

from tokenizers import Tokenizer

from server.decoders import Decoding

_SEAM = 32
"""Shown tokens of a prompt that its answer's reader sees: more than a character has bytes, or a decoder looks back."""

_log = logging.getLogger(__name__)


class TokenText:
    """What each token of one vocabulary stands for. Owns one entry per token."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises StartupError for a decoder that is not known."""
        self.decoding = Decoding(json.loads(tokenizer.to_str()).get("decoder"))
        self._is_late = self.decoding.is_late
        if self._is_late:
            _log.warning("the tokenizer applies a regular expression to whole texts: answers come in one piece")
        added = tokenizer.get_added_tokens_decoder()
        vocabulary = {id_: text for text, id_ in tokenizer.get_vocab(with_added_tokens=True).items()}
        self.hidden = {id_: token.content for id_, token in added.items() if token.special}
        """The names of special tokens, which are no text."""
        self._spelled: list[str | bytes | None] = [None] * (max(vocabulary, default=-1) + 1)
        base = tokenizer.get_vocab(with_added_tokens=False)
        for id_, text in vocabulary.items():
            if id_ not in self.hidden:
                self._spelled[id_] = self.decoding.spell(text, is_added=text not in base)
        self.special_names = frozenset(self.hidden.values())
        self._added = {token.content: id_ for id_, token in added.items()}
        self._labels = self._make_labels()

    def added_token(self, text: str) -> int | None:
        """The token that was added to the vocabulary for just this text, special or not; None if there is none."""
        return self._added.get(text)

    def tail(self, tokens: Sequence[int], marks: Collection[str]) -> str:
        """The text at the end of a prompt, in which `marks` are seen though they are special tokens."""
        reader = Reader(self, marks)
        return reader.feed(tokens[-_SEAM:]) + reader.finish()

    def reader(self, prompt: Sequence[int] = (), marks: Collection[str] = ()) -> Reader:
        """Reads one answer. With a `prompt` the answer continues its text: a character that the prompt has begun
        belongs to the answer, and no space is stripped at the seam. `marks`: special tokens whose names are text."""
        reader = Reader(self, marks)
        if not self._is_late:
            shown = (token for token in reversed(prompt) if reader.shows(token))
            reader.feed([*islice(shown, _SEAM)][::-1])
        return reader

    def read_prompt(self, prompt: Sequence[int], marks: Collection[str] = ()) -> str:
        """The text of a prompt, without a character that it only begins."""
        reader = Reader(self, marks)
        return reader.feed(prompt) + (reader.finish() if self._is_late else "")

    def spelled(self, token: int) -> str | bytes | None:
        """What a decoder is given for a token; None if it is no text: a special one, or one without a name."""
        return self._spelled[token] if 0 <= token < len(self._spelled) else None

    def spell(self, token: int) -> bytes:
        """The bytes that a token adds to a text which has begun; none for a token that is no text."""
        spelled = self.spelled(token)
        return b"" if spelled is None else self.decoding.middle(spelled)

    def name(self, token: int) -> str:
        """The text that a token adds, or a label if it adds none, or only a part of a character, or what another token
        adds: no two tokens have one name. Bytes are labelled as OpenAI does it, `bytes:\\xf0`."""
        if token in self._labels:
            return self._labels[token]
        return self.spell(token).decode() or f"token_id:{token}"

    def _make_labels(self) -> dict[int, str]:
        """The names that are not the text of their token."""
        labels = dict(self.hidden)
        taken = {"", *labels.values()}
        shown = [id_ for id_, spelled in enumerate(self._spelled) if spelled is not None]
        # A token that is written as text has the first claim on it, before one that stands for its byte.
        shown.sort(key=lambda id_: isinstance(self._spelled[id_], bytes))
        for id_ in shown:
            data = self.spell(id_)
            name = _whole_text(data)
            if name in taken and data:
                name = labels[id_] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            if name in taken:
                name = labels[id_] = f"token_id:{id_}"
            taken.add(name)
        return labels


def _whole_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


class Reader:
    """Reads one answer. Owns what is not certain yet."""

    def __init__(self, text: TokenText, marks: Collection[str] = ()):
        shown = {id_: name for id_, name in text.hidden.items() if name in marks} if marks else {}
        self.hidden = {id_: name for id_, name in text.hidden.items() if id_ not in shown} if shown else text.hidden
        self._spelled = text.spelled
        self._shown = {id_: text.decoding.spell(name, is_added=True) for id_, name in shown.items()}
        self._take, self._first, self._sink = text.decoding.chain()

    def shows(self, token: int) -> bool:
        """Whether a token is part of the text."""
        return token in self._shown or self._spelled(token) is not None

    def feed(self, tokens: Iterable[int]) -> str:
        """Text that became certain with these tokens."""
        for token in tokens:
            spelled = self._spelled(token)
            if spelled is None:
                spelled = self._shown.get(token)
            if spelled is not None:
                self._take(spelled)
        return self._sink.take()

    def finish(self) -> str:
        """The rest, now that nothing follows."""
        self._first.finish()
        return self._sink.take()


class _Finder:
    """Looks for stop strings in a text that grows; positions count its shown characters.

    If it `sees_names`, the text it looks through holds the names of special tokens, which are not shown. Owns the end
    of the text that may become a stop string, and the places of the names in it.
    """

    def __init__(self, stop: Sequence[str], *, sees_names: bool):
        self._stop = stop
        self._sees_names = sees_names
        self._prefixes = frozenset(text[:end] for text in stop for end in range(1, len(text)))
        self._longest = max(map(len, stop))
        self._held = ""
        self._names: list[tuple[int, int]] = []  # start in the held text, length
        self.safe = 0
        """No stop string begins before this position."""

    def feed(self, text: str, name: str) -> tuple[int, int, str] | None:
        """More text, or a name. Returns start, end and text of the first stop string, once it is complete."""
        if name and self._sees_names:
            self._names.append((len(self._held), len(name)))
            text = name
        held = self._held + text
        found = [(start, -len(stop), stop) for stop in self._stop if (start := held.find(stop)) >= 0]
        if found:
            start, size, stop = min(found)
            return self.safe + self._num_shown(start), self.safe + self._num_shown(start - size), stop
        cut = max(0, len(held) - self._longest + 1)
        while cut < len(held) and held[cut:] not in self._prefixes:
            cut += 1
        self.safe += self._num_shown(cut)
        if self._names:
            rest = ((max(0, start - cut), size - max(0, cut - start)) for start, size in self._names)
            self._names = [place for place in rest if place[1] > 0]
        self._held = held[cut:]
        return None

    def skip(self, text: str) -> None:
        """No stop string may begin in this text."""
        self.safe += len(text)

    def _num_shown(self, end: int) -> int:
        """Shown characters of the held text before `end`."""
        return end - sum(min(size, end - start) for start, size in self._names if start < end) if self._names else end


class Detokenizer:
    """The text of one answer, and where it stops. Owns the reader and the text that is held back.

    A stop string that holds the name of a special token is looked for in the text with such names, which are not shown.
    `num_tokens` counts the tokens of the answer up to the one that completed a stop string; `length` is the number of
    characters known so far, held ones included.
    """

    def __init__(self, reader: Reader, stop: tuple[str, ...] = (), *, keeps_stop: bool = False, min_tokens: int = 0):
        self._reader = reader
        self._keeps_stop = keeps_stop
        self._min_tokens = min_tokens
        named = [text for text in stop if any(name in text for name in reader.hidden.values())]
        plain = [text for text in stop if text not in named]
        self._finders = [_Finder(texts, sees_names=texts is named) for texts in (plain, named) if texts]
        self._held = ""
        self.num_tokens = 0
        self.length = 0
        self.stopped_by: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string is complete; `stopped_by` is that one."""
        return self.stopped_by is not None

    def feed(self, tokens: Sequence[int]) -> str:
        """Text to send now. After a stop string `is_stopped` is true and further tokens are not counted."""
        if not self._finders:
            self.num_tokens += len(tokens)
            text = self._reader.feed(tokens)
            self.length += len(text)
            return text
        out: list[str] = []
        for token in tokens:
            if self.is_stopped:
                break
            self.num_tokens += 1
            out.append(self._take(self._reader.feed((token,)), self._reader.hidden.get(token, "")))
        return "".join(out)

    def count(self, num_tokens: int) -> None:
        """Count tokens that are not part of the text, such as a stop token."""
        self.num_tokens += num_tokens

    def finish(self) -> str:
        """The rest of the text; a stop string may show up only here."""
        if self.is_stopped:
            return ""
        text = self._take(self._reader.finish(), "")
        held, self._held = self._held, ""
        return text + held

    def _take(self, text: str, name: str) -> str:
        """Text to send now that more of it, or the name of a special token, came in."""
        if not text and not name:
            return ""
        self._held += text
        self.length += len(text)
        if self.num_tokens <= self._min_tokens:
            for finder in self._finders:
                finder.skip(text)
            return self._give_out(len(self._held))
        matches = [match for finder in self._finders if (match := finder.feed(text, name)) is not None]
        num_given_out = self.length - len(self._held)
        if matches:
            start, end, self.stopped_by = min(matches, key=lambda match: (match[0], -match[1]))
            self.length = end if self._keeps_stop else start
            text, self._held = self._held[: self.length - num_given_out], ""
            return text
        return self._give_out(min([self.length, *(finder.safe for finder in self._finders)]) - num_given_out)

    def _give_out(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
