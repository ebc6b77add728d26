"""What clients may send to the routes that turn text into tokens and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from server.api.fields import NOTHING
from server.api.schema import MAX_MESSAGES, Message, Text

MAX_TOKENS_READ = 2**20
"""Token ids of one request to be read; also the most that one text or conversation may have."""


def _tell_of_nothing(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = NOTHING


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_tell_of_nothing)

    model: str | None = None


class TokenizeRequest(_Strict):
    """POST /tokenize: a text, or a conversation as the model's chat template renders it."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENS_READ)]
