"""The Scribe: messages or text to token ids, off the event loop.

Special-token text inside a chat message is plain text: no message can forge a turn or an end of answer. The prompt
of a completion is the caller's own and is encoded as the tokenizer would, special tokens included.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from tokenizers import Tokenizer

from server.chat_template import ChatTemplate, Message
from server.config import Settings
from server.detokenize import TokenText
from server.errors import ContextTooLong, InvalidRequest
from server.model_files import GenerationDefaults, ModelFiles, locate, read
from server.tokenizer import end_ids, load_tokenizer

_THREADS = 2
_PROBE_CHARS_PER_TOKEN = 8
"""A prompt of more characters per token of context than this is counted slice by slice before it is encoded."""
_SLICE_CHARS = 65536
_MIN_LONGEST = 16

Result = TypeVar("Result")


class Scribe:
    """Turns what a client wrote into token ids, and knows how to read ids back.

    Owns the tokenizer, the compiled chat template and a small thread pool; `close` ends the pool.
    """

    def __init__(self, settings: Settings):
        """Read the model's tokenizer and template. Raises StartupError in one clear line."""
        files = read(locate(settings.model, settings.revision))
        self._tokenizer = load_tokenizer(files)
        self.text = TokenText(self._tokenizer)
        self.defaults: GenerationDefaults = files.defaults
        self.eos_ids = end_ids(files, self._tokenizer)
        self._template = (
            None if files.chat_template is None else ChatTemplate(files.chat_template, files.special_tokens)
        )
        self._plain = _PlainEncoder(files, self._tokenizer)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._longest = max(_MIN_LONGEST, max((len(token) for token in vocabulary), default=0))
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="scribe")

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can chat."""
        return self._template is not None

    async def chat(self, messages: Sequence[Message], max_model_len: int) -> tuple[int, ...]:
        """Prompt ids of a conversation; the template brings its own special tokens, none are added.

        Raises InvalidRequest without a template or when it refuses, ContextTooLong over `max_model_len`.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template, so it cannot answer messages; use /v1/completions", param="messages"
            )
        self._check_chars(sum(len(message["content"]) for message in messages), max_model_len, "messages")
        return await self._run(lambda: self._chat(messages, max_model_len))

    async def encode(
        self, text: str, max_model_len: int, param: str = "prompt", *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Ids of a completion's prompt, with or without the special tokens that the tokenizer adds by itself."""
        self._check_chars(len(text), max_model_len, param)
        return await self._run(lambda: self._encode(text, max_model_len, param, add_special_tokens=add_special_tokens))

    async def predict(self, text: str, max_model_len: int, param: str = "prediction.content") -> tuple[int, ...]:
        """Ids of what a client expects the answer to a conversation to be; special-token text is plain text.

        Raises InvalidRequest when it is longer than `max_model_len` tokens: no answer can be.
        """
        most = f"a prediction may have at most the {max_model_len} tokens of this model's context"
        if len(text) > self._longest * max_model_len:
            raise InvalidRequest(f"'{param}' has {len(text)} characters; {most}.", param=param)
        ids = await self._run(lambda: self._plain.encode_answer(text))
        if len(ids) > max_model_len:
            raise InvalidRequest(f"'{param}' has {len(ids)} tokens; {most}.", param=param)
        return ids

    def close(self) -> None:
        """End the thread pool."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _chat(self, messages: Sequence[Message], max_model_len: int) -> tuple[int, ...]:
        assert self._template is not None
        if not any(self._plain.finds(message["content"]) for message in messages):
            text = self._template.render(messages)
            return self._encode(text, max_model_len, "messages", add_special_tokens=False)
        guard = self._plain.guard(messages)
        text = self._template.render(guard.messages)
        return check_length(self._plain.encode(text, guard), max_model_len, "messages")

    def _encode(self, text: str, max_model_len: int, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if len(text) > _PROBE_CHARS_PER_TOKEN * max_model_len:
            self._check_slices(text, max_model_len, param)
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return check_length(tuple(ids), max_model_len, param)

    def _check_chars(self, num_chars: int, max_model_len: int, param: str) -> None:
        """Refuse what cannot fit even if every token were the longest of the vocabulary: no need to encode it."""
        if num_chars > self._longest * max_model_len:
            raise _too_long(max_model_len, f"has {num_chars} characters, which no tokenization can fit", param)

    def _check_slices(self, text: str, max_model_len: int, param: str) -> None:
        """Stop counting as soon as the answer is known. A cut costs at most a few tokens, which are allowed for."""
        count = 0
        for start in range(0, len(text), _SLICE_CHARS):
            piece = text[start : start + _SLICE_CHARS]
            count += max(0, len(self._tokenizer.encode(piece, add_special_tokens=False).ids) - self._longest)
            if count > max_model_len:
                raise _too_long(max_model_len, f"has more than {count} tokens ({len(text)} characters)", param)


def check_length(ids: tuple[int, ...], max_model_len: int, param: str) -> tuple[int, ...]:
    """`ids`, if they are not empty and leave room for at least one token of answer."""
    if not ids:
        raise InvalidRequest(f"'{param}' is empty: at least one token is needed", param=param)
    if len(ids) >= max_model_len:
        raise _too_long(max_model_len, f"has {len(ids)} tokens, which leaves no room for an answer", param)
    return ids


def _too_long(max_model_len: int, what: str, param: str) -> ContextTooLong:
    return ContextTooLong(
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt {what}. "
        f"Please shorten '{param}'.",
        param=param,
    )


class _Guard:
    """Messages whose special-token text is hidden behind marks, and the way back."""

    def __init__(self, messages: Sequence[Message], find_spans: Callable[[str], Iterator[tuple[int, int]]]):
        text = "".join(message["content"] for message in messages)
        nonce = secrets.token_hex(4)
        while nonce in text:
            nonce = secrets.token_hex(8)
        self._hidden: list[str] = []
        self._mark = re.compile(rf"\ue000{nonce}\.(\d+)\ue001")
        self._nonce = nonce
        self.messages = [
            {**message, "content": self._hide(message["content"], find_spans(message["content"]))}
            for message in messages
        ]

    def _hide(self, text: str, spans: Iterator[tuple[int, int]]) -> str:
        out: list[str] = []
        end = 0
        for left, right in spans:
            out += [text[end:left], f"\ue000{self._nonce}.{len(self._hidden)}\ue001"]
            self._hidden.append(text[left:right])
            end = right
        return "".join(out) + text[end:]

    def restore(self, text: str) -> str:
        """Put the hidden text back."""
        return self._mark.sub(lambda match: self._hidden[int(match.group(1))], text)


class _PlainEncoder:
    """Encodes a rendered chat so that only the template's special tokens are special.

    Owns two more instances of the tokenizer that take special-token text as plain text: one for the start of a prompt,
    one for what follows a special token (they differ only where a prefix space is added to the start alone).
    """

    def __init__(self, files: ModelFiles, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        texts = sorted(filter(None, self._special.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        # A normalizer may turn other text into a special token's, so there the tokenizer itself has to be asked.
        self._is_lax = tokenizer.normalizer is not None and any(
            token.special and token.normalized for token in tokenizer.get_added_tokens_decoder().values()
        )
        self._first = load_tokenizer(files)
        self._first.encode_special_tokens = True
        self._inner = load_tokenizer(replace(files, tokenizer_json=_without_first_prefix(files.tokenizer_json)))
        self._inner.encode_special_tokens = True

    def finds(self, text: str) -> bool:
        """Whether `text` spells a special token."""
        return next(self._spans(text), None) is not None

    def guard(self, messages: Sequence[Message]) -> _Guard:
        """Hide the special-token text of `messages` from the template and the tokenizer."""
        return _Guard(messages, self._spans)

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where `text` spells special tokens, from left to right."""
        if self._is_lax:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            pairs = zip(encoding.ids, encoding.offsets, strict=True)
            yield from (span for token_id, span in pairs if token_id in self._special and span[1] > span[0])
        elif self._pattern is not None:
            yield from (match.span() for match in self._pattern.finditer(text))

    def encode(self, text: str, guard: _Guard) -> tuple[int, ...]:
        """Cut the rendered text at its true special tokens, which are the template's, and encode between them.

        The tokenizer cuts there too, so the ids differ from an ordinary encoding only where text was hidden.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        start = 0
        for token_id, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._special and right > left:
                ids.extend(self._encode_piece(guard.restore(text[start:left]), is_first=start == 0))
                ids.append(token_id)
                start = right
        ids.extend(self._encode_piece(guard.restore(text[start:]), is_first=start == 0))
        return tuple(ids)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Ids of a text that follows the prompt: nothing in it is special, and nothing is put before it."""
        return tuple(self._encode_piece(text, is_first=False))

    def _encode_piece(self, text: str, *, is_first: bool) -> list[int]:
        if not text:
            return []
        tokenizer = self._first if is_first else self._inner
        return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _without_first_prefix(tokenizer_json: str) -> str:
    """The same tokenizer, but text after a special token gets no prefix space where only the first piece has one."""
    spec = json.loads(tokenizer_json)
    pending = [spec.get("pre_tokenizer")]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
            pending.extend(part.get("pretokenizers", []))
    return json.dumps(spec)
