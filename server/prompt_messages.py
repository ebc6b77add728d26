"""The frozen values that cross the border between the API process and a process that renders and encodes prompts."""

from __future__ import annotations

from typing import Literal

import msgspec

from server.grammar import Grammar
from server.model_files import ModelFiles
from server.template_tools import Message

MEMORY_BYTES = 2**30
"""What one job may take beside tokenizer and template. A million tokens, or characters, take a fifth of it."""
OUT_OF_MEMORY = 112
"""Exit code of a process that met that limit."""
MAX_WORD_TOKENS = 1024
"""Tokens of all spellings of a request's `bad_words`; vLLM sets the same limit."""

Ending = Literal["header", "none", "open"]
"""How a rendered conversation ends: with the header of the assistant's turn, with its last message, or in the middle
of that message, which the answer continues."""


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Read this tokenizer and template. The first message, answered by Loaded."""

    files: ModelFiles


class Chat(msgspec.Struct, frozen=True, tag="chat"):
    """Render and encode a conversation that has to fit `max_model_len`."""

    messages: tuple[Message, ...]
    max_model_len: int
    timeout_s: float
    param: str = "messages"
    ending: Ending = "header"
    extras: str = ""
    """Tools and variables of the template (see server.template_variables), a pair as JSON: msgpack holds no integer of
    more than 64 bits."""
    effort: str | None = None
    """Of reasoning."""


class Encode(msgspec.Struct, frozen=True, tag="encode"):
    """Encode the prompt of a completion that has to fit `max_model_len`."""

    text: str
    max_model_len: int
    param: str
    timeout_s: float
    add_special_tokens: bool = True
    """Those that the tokenizer adds by itself."""


class Predict(msgspec.Struct, frozen=True, tag="predict"):
    """Encode what a client expects the answer to be, of at most `max_model_len` tokens."""

    text: str
    max_model_len: int
    param: str
    timeout_s: float


class EncodeWords(msgspec.Struct, frozen=True, tag="words"):
    """Encode each of these texts as a piece of an answer; of all together at most MAX_WORD_TOKENS tokens are needed."""

    texts: tuple[str, ...]
    param: str
    timeout_s: float


class Check(msgspec.Struct, frozen=True, tag="check"):
    """Compile a grammar to see whether it can be. Answered by Checked."""

    grammar: Grammar
    timeout_s: float

    @property
    def param(self) -> str:
        """The field that asked for it."""
        return self.grammar.param


Job = Chat | Encode | Predict | EncodeWords | Check
ToPromptProcess = Load | Job


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Jobs can come."""


class Ids(msgspec.Struct, frozen=True, tag="ids"):
    """A job is done."""

    ids: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    """Of a job of several texts: how many ids each one has."""


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """A grammar can be compiled; this is its text in the form that a worker takes."""

    grammar: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A job, or the model's files, cannot be right."""

    message: str
    param: str | None = None
    is_too_long: bool = False
    is_unsupported: bool = False


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A fault of ours; the story is for the log."""

    story: str


FromPromptProcess = Loaded | Ids | Checked | Refused | Failed
