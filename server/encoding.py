"""Messages or text to token ids: the part of a prompt that takes time and memory, for a process that can be stopped.

Special-token text inside a chat message is plain text: no message can forge a turn or an end of answer. The prompt
of a completion is the caller's own and is encoded as the tokenizer would, special tokens included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from server.chat_template import ChatTemplate
from server.errors import InvalidRequest
from server.model_files import ModelFiles
from server.prompt_limits import check_length, longest_token, prediction_too_long, prompt_too_long
from server.prompt_messages import MAX_WORD_TOKENS, Ending
from server.special_text import Guard, SpecialText
from server.template_tools import Message, with_arguments_read
from server.tokenizer import load_tokenizer

_PROBE_CHARS_PER_TOKEN = 8
"""A text of more characters per token of context than this is counted slice by slice before it is encoded."""
_PROBE_CHARS = 2**20
"""And so is a longer one than this: a character may be four tokens, and a token take 200 bytes while it is encoded."""
_SLICE_CHARS = 65536

_STRUCTURE = frozenset(
    {
        *("content", "name", "tool_calls", "tool_call_id", "reasoning_content"),
        *("id", "type", "function", "arguments", "text", "description", "parameters", "strict"),
    }
)
"""Names of fields by which templates find what clients wrote; all other names are text of a client too."""


class PromptEncoder:
    """A model's tokenizer and chat template at work. Owns both; one thread uses it."""

    def __init__(self, files: ModelFiles):
        """Raises StartupError in one clear line."""
        self._tokenizer = load_tokenizer(files)
        self._longest = longest_token(self._tokenizer)
        self._special = SpecialText(self._tokenizer)
        self._template = (
            None if files.chat_template is None else ChatTemplate(files.chat_template, files.special_tokens)
        )
        inner = _without_first_prefix(files.tokenizer_json)
        # What follows a special token differs from the start of a prompt only where that alone gets a prefix space.
        self._inner = self._tokenizer if inner is None else load_tokenizer(replace(files, tokenizer_json=inner))

    @property
    def special_tokens(self) -> list[str]:
        """The names of the tokens that are no text."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def chat(
        self,
        messages: Sequence[Message],
        max_model_len: int,
        *,
        ending: Ending = "header",
        tools: Sequence[dict[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
        effort: str | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation; the template brings its own special tokens, none are added.

        They end with the header of the assistant's turn, unless told otherwise. `tools`, `kwargs` and `effort` go to
        the template. Raises InvalidRequest when it refuses, ContextTooLong over `max_model_len`.
        """
        assert self._template is not None, "the API process knows which model can chat"
        # Arguments are read before anything is hidden: JSON may spell a special token with escapes.
        messages = [with_arguments_read(message) for message in messages]
        guard = None
        turns = [{name: value for name, value in message.items() if name != "role"} for message in messages]
        if any(self._special.is_in(text) for text in _texts([turns, tools, kwargs or {}])):
            guard = Guard(self._special)
            messages = [{"role": message["role"], **_each_text(turn, guard.hide)}
                        for message, turn in zip(messages, turns, strict=True)]  # fmt: skip
            tools = [_each_text(tool, guard.hide) for tool in tools]
            kwargs = _each_text(dict(kwargs or {}), guard.hide)
        text = self._template.render(messages, ending=ending, tools=tools, kwargs=kwargs, effort=effort)
        if guard is None:
            return self.encode(text, max_model_len, "messages", add_special_tokens=False)
        return check_length(self._guarded(text, guard, max_model_len), max_model_len, "messages")

    def encode(self, text: str, max_model_len: int, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text that may spell special tokens, with those that the tokenizer adds by itself if wanted."""
        if found := self._count_over(self._tokenizer, text, max_model_len):
            raise prompt_too_long(max_model_len, f"has more than {found} tokens ({len(text)} characters)", param)
        return check_length(_ids(self._tokenizer, text, add_special_tokens), max_model_len, param)

    def predict(self, text: str, max_model_len: int, param: str) -> list[int]:
        """Ids of a text that follows the prompt: nothing in it is special, and nothing is put before it."""
        ids = self._plain(text, max_model_len, is_first=False)
        if ids is None or len(ids) > max_model_len:
            size = f"more than {max_model_len}" if ids is None else str(len(ids))
            raise prediction_too_long(max_model_len, f"{size} tokens", param)
        return ids

    def words(self, texts: Sequence[str], param: str) -> list[list[int]]:
        """Ids of each text as a piece of an answer. Raises InvalidRequest for one that is too long by itself."""
        found = [self._plain(text, MAX_WORD_TOKENS, is_first=False) for text in texts]
        known = [ids for ids in found if ids is not None and len(ids) <= MAX_WORD_TOKENS]
        if len(known) < len(found):
            raise InvalidRequest(f"'{param}' may have at most {MAX_WORD_TOKENS} tokens in all.", param=param)
        return known

    def _guarded(self, text: str, guard: Guard, max_model_len: int) -> list[int]:
        """Cut the rendered text at its true special tokens, which are the template's, and encode between them.

        The tokenizer cuts there too, so the ids differ from an ordinary encoding only where text was hidden. A prompt
        that is too long is left as soon as that is known.
        """
        ids: list[int] = []
        start = 0
        for left, right, token in self._special.cut(text):
            piece = self._plain(guard.restore(text[start:left]), max_model_len - len(ids), is_first=start == 0)
            if piece is None or len(ids) > max_model_len:
                raise prompt_too_long(max_model_len, f"has more than {max_model_len} tokens", "messages")
            ids += piece
            if token is not None:
                ids.append(token)
            start = right
        return ids

    def _plain(self, text: str, most: int, *, is_first: bool) -> list[int] | None:
        """Ids of a text in which nothing is special, or None if they are clearly more than `most`."""
        if not text:
            return []
        tokenizer = self._tokenizer if is_first else self._inner
        tokenizer.encode_special_tokens = True
        try:
            return None if self._count_over(tokenizer, text, most) else _ids(tokenizer, text, False)
        finally:
            tokenizer.encode_special_tokens = False

    def _count_over(self, tokenizer: Tokenizer, text: str, most: int) -> int:
        """How many tokens a long text has at least, if they are more than `most`; else 0. It stops when that is known.

        A cut between slices costs at most a few tokens, which are allowed for.
        """
        if len(text) <= min(_PROBE_CHARS, _PROBE_CHARS_PER_TOKEN * max(most, 0)):
            return 0
        count = 0
        for start in range(0, len(text), _SLICE_CHARS):
            ids = _ids(tokenizer, text[start : start + _SLICE_CHARS], False)
            count += max(0, len(ids) - self._longest)
            if count > most:
                return count
        return 0


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The fast call leaves out offsets, which nobody asks for."""
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _texts(value: Any) -> Iterator[str]:
    """What a client wrote at any depth, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (name for name in value if name not in _STRUCTURE)
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name if name in _STRUCTURE else change(name): _each_text(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return value


def _without_first_prefix(tokenizer_json: str) -> str | None:
    """The same tokenizer, but text after a special token gets no prefix space where only the first piece has one.

    None where the given one is like that.
    """
    if '"first"' not in tokenizer_json:
        return None  # most have no such part, and large files take long to read
    spec = json.loads(tokenizer_json)
    pending = [spec.get("pre_tokenizer")]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
            pending.extend(part.get("pretokenizers", []))
    return json.dumps(spec)
