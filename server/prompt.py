"""The Scribe: messages or text to token ids, off the event loop and out of this process.

What takes time or memory happens in processes that are ended when it is too much (server.prompt_pool). Here is what has
to be known of every prompt at once, and how ids are read back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from server.config import Settings
from server.detokenize import TokenText
from server.errors import InvalidRequest
from server.grammar import Grammar
from server.grammar_cache import GrammarCache
from server.messages import Vocabulary
from server.model_files import GenerationDefaults, locate, read
from server.prompt_limits import most_chars_per_token, prediction_too_long, prompt_too_long
from server.prompt_messages import Chat, Check, Encode, EncodeWords, Ending, Predict
from server.prompt_pool import PromptPool
from server.template_tools import Message
from server.tokenizer import end_ids, load_tokenizer
from server.tools.families import dialect_of
from server.tools.thinking import thinks

_CHARS_PER_TIMEOUT = 2**20
"""Characters of a prompt that get as much time again: a slow core encodes them in three seconds."""


class Scribe:
    """Turns what a client wrote into token ids, and knows how to read ids back.

    Owns the pool of processes that render and encode, which `close` ends, and what is known of grammars.
    """

    def __init__(self, settings: Settings):
        """Read the model's tokenizer. Raises StartupError in one clear line."""
        files = read(locate(settings.model, settings.revision))
        tokenizer = load_tokenizer(files)
        self.text = TokenText(tokenizer)
        self.defaults: GenerationDefaults = files.defaults
        self.eos_ids = end_ids(files, tokenizer)
        self.vocabulary = Vocabulary(files.tokenizer_json, self.eos_ids)
        """What a worker must know of tokens to keep to a grammar."""
        self.has_chat_template = files.chat_template is not None
        """Whether the model can chat."""
        template = files.chat_template or ""
        self.dialect = dialect_of(template, settings.tool_call_parser)
        """How the model calls tools; None if nobody knows."""
        self.thinks = thinks(template)
        """Whether its answers may begin with thinking."""
        self._chars_per_token = most_chars_per_token(tokenizer)
        self._timeout_s = settings.prompt_timeout_s
        self._grammar_timeout_s = settings.grammar_timeout_s
        self._grammars = GrammarCache()
        self._pool = PromptPool(files)

    async def start(self) -> None:
        """Have everything ready for the first request. Raises StartupError, as for a template that does not compile."""
        await self._pool.start()

    async def chat(
        self,
        messages: Sequence[Message],
        max_model_len: int,
        *,
        ending: Ending = "header",
        tools: Sequence[dict[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
        effort: str | None = None,
    ) -> tuple[int, ...]:
        """Prompt ids of a conversation; the template brings its own special tokens, none are added.

        `tools`, `kwargs` and `effort` go to the template. Raises InvalidRequest without one or when it refuses,
        ContextTooLong over `max_model_len`.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template, so it cannot answer messages; use /v1/completions", param="messages"
            )
        num_chars = sum(len(value) for message in messages for value in message.values() if isinstance(value, str))
        nested = [message["tool_calls"] for message in messages if "tool_calls" in message]
        num_chars += len(msgspec.json.encode(nested)) if nested else 0
        extras = json.dumps([list(tools), dict(kwargs or {})], ensure_ascii=False) if tools or kwargs else ""
        num_chars += len(extras)
        self._check_chars(sum(len(message.get("content") or "") for message in messages), max_model_len, "messages")
        job = Chat(
            tuple(messages),
            max_model_len,
            self._seconds(num_chars),
            ending=ending,
            extras=extras,
            effort=effort,
        )
        return await self._pool.run(job, num_chars)

    async def encode(
        self, text: str, max_model_len: int, param: str = "prompt", *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Ids of a completion's prompt, with or without the special tokens that the tokenizer adds by itself."""
        self._check_chars(len(text), max_model_len, param)
        job = Encode(text, max_model_len, param, self._seconds(len(text)), add_special_tokens)
        return await self._pool.run(job, len(text))

    async def predict(self, text: str, max_model_len: int, param: str = "prediction.content") -> tuple[int, ...]:
        """Ids of what a client expects the answer to a conversation to be; special-token text is plain text.

        Raises InvalidRequest when it is longer than `max_model_len` tokens: no answer can be.
        """
        if self._cannot_fit(len(text), max_model_len):
            raise prediction_too_long(max_model_len, f"{len(text)} characters", param)
        return await self._pool.run(Predict(text, max_model_len, param, self._seconds(len(text))), len(text))

    async def encode_words(self, texts: Sequence[str], param: str) -> list[tuple[int, ...]]:
        """Ids of each text as a piece of an answer; special-token text is plain text. Raises InvalidRequest."""
        num_chars = sum(map(len, texts))
        found = await self._pool.run_words(EncodeWords(tuple(texts), param, self._seconds(num_chars)), num_chars)
        ends = [0, *accumulate(found.lengths)]
        return [found.ids[start:stop] for start, stop in pairwise(ends)]

    async def check(self, grammar: Grammar) -> str:
        """The text of a grammar, in the form that a worker takes. Raises InvalidRequest if it cannot be compiled."""
        if (known := self._grammars.get(grammar)) is not None:
            return known
        text = await self._pool.check(Check(grammar, self._grammar_timeout_s))
        self._grammars.put(grammar, text)
        return text

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _seconds(self, num_chars: int) -> float:
        """How long rendering and encoding so much may take."""
        return self._timeout_s * (1 + num_chars / _CHARS_PER_TIMEOUT)

    def _cannot_fit(self, num_chars: int, max_model_len: int) -> bool:
        """Whether it is too long even if every token were the longest of the vocabulary: no need to encode it."""
        return self._chars_per_token is not None and num_chars > self._chars_per_token * max_model_len

    def _check_chars(self, num_chars: int, max_model_len: int, param: str) -> None:
        if self._cannot_fit(num_chars, max_model_len):
            raise prompt_too_long(max_model_len, f"has {num_chars} characters, which no tokenization can fit", param)
