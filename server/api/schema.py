"""What clients may send: strict pydantic models, which are also the truth of /openapi.json.

Unknown fields are refused, unless they ask for nothing (`server.api.fields`). Fields without effect, accepted because
clients send them by habit: `user`, `metadata`, `store`, `service_tier`, `safety_identifier`, `prompt_cache_key`, those
of `server.api.fields`; and a message's `name`, which goes to the model's chat template, where most templates drop it.
Nothing of this module passes beyond `server.api`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, WithJsonSchema

from server.api.fields import (
    NOTHING,
    REASONING_PARTS,
    TEXT_PARTS,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_IN_ANSWER,
    WITHOUT_EFFECT_IN_MESSAGE,
)
from server.api.structured_schema import Structured
from server.api.tool_schema import MAX_ID_CHARS, MAX_TOOLS, ToolCall, ToolChoice, ToolDefinition

MAX_N = 128
MAX_MESSAGES = 4096
MAX_PARTS = 64
MAX_PROMPTS = 128
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 1024
MAX_SALT_CHARS = 128
MAX_METADATA = 16
MAX_PREDICTION_CHARS = 2**20
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
_INT64 = 2**63

_Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def _text(value: str) -> str:
    if "\x00" in value:
        raise ValueError("must not hold the character NUL")
    return value


Text = Annotated[str, AfterValidator(_text)]


def _stop(value: Any) -> list[str]:
    """Stop strings as a list; an empty text asks for none."""
    entries = [value] * bool(value) if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError("must be a string or a list of strings")
    for entry in entries[:MAX_N]:
        if not 1 <= len(entry) <= MAX_STOP_CHARS:
            raise ValueError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(entry)}")
        _text(entry)
    return entries


def _bad_word(value: str) -> str:
    if not value.strip() or len(value) > MAX_BAD_WORD_CHARS:
        raise ValueError(f"each bad word must have 1 to {MAX_BAD_WORD_CHARS} characters, blanks before it aside")
    return _text(value)


def _content(value: Any, info: ValidationInfo) -> str:
    """Text parts are joined with line breaks, as in vLLM. An assistant's turn may have none: it called a tool, say."""
    if value is None:
        if info.data.get("role") == "assistant":
            return ""
        raise ValueError("is required: a string or a list of text parts")
    return "\n".join(_texts(value))


def _predicted(value: Any) -> str:
    """Text parts of a prediction are pieces of one text."""
    text = "".join(_texts(value))
    if len(text) > MAX_PREDICTION_CHARS:
        raise ValueError(f"must have at most {MAX_PREDICTION_CHARS} characters, got {len(text)}")
    return text


def _texts(value: Any) -> list[str]:
    """The text, or the texts of all parts."""
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"must have at most {MAX_PARTS} parts, got {len(value)}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('each part must be {"type": "text", "text": ...}: this model reads text only')
        texts.append(_text(part["text"]))
    return texts


def _prompt(value: Any) -> list[str] | list[list[int]]:
    """Every form of prompt as a list of texts or a list of token lists."""
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of these, and not empty")
    if type(value[0]) is int:
        return [_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"must hold at most {MAX_PROMPTS} prompts, got {len(value)}")
    if all(isinstance(entry, str) for entry in value):
        return [_text(entry) for entry in value]
    if all(isinstance(entry, list) for entry in value):
        return [_token_ids(entry) for entry in value]
    raise ValueError("must not mix texts and token ids")


def _token_ids(value: list[Any]) -> list[int]:
    if not set(map(type, value)) <= {int}:  # at the speed of C: there may be a million
        raise ValueError("token ids must be integers")
    return value


def _union(*schemas: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(schemas)}, mode="validation")


_STRING = {"type": "string"}
_FULL = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_WITHOUT_EFFECT = {"description": "Without effect."}
_WITHOUT_EFFECT_IN_ANSWER = {"description": "Of a turn of the assistant; without effect."}
_TEXT_PART = {
    "type": "object",
    "properties": {
        "type": {"enum": [*TEXT_PARTS]},
        "text": _STRING,
        **dict.fromkeys(sorted(WITHOUT_EFFECT_IN_ANSWER), _WITHOUT_EFFECT_IN_ANSWER),
        **dict.fromkeys(sorted(WITHOUT_EFFECT_IN_MESSAGE), _WITHOUT_EFFECT),
    },
    "required": ["type", "text"],
    "additionalProperties": NOTHING,
}
_REASONING_PART = {
    "type": "object",
    "properties": {"type": {"enum": [*REASONING_PARTS]}},
    "required": ["type"],
    **_WITHOUT_EFFECT_IN_ANSWER,
}
_PARTS = {"type": "array", "maxItems": MAX_PARTS, "items": _TEXT_PART}
_TURN_PARTS = {**_PARTS, "items": {"anyOf": [_TEXT_PART, _REASONING_PART]}}

BadWord = Annotated[str, AfterValidator(_bad_word)]
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stop = Annotated[
    list[str],
    PlainValidator(_stop),
    _union({"type": "string", "maxLength": MAX_STOP_CHARS}, {"type": "array", "items": _STOP}),
]
Content = Annotated[str, PlainValidator(_content), _union(_STRING, _TURN_PARTS, {"type": "null"})]
Predicted = Annotated[str, PlainValidator(_predicted), _union({**_STRING, "maxLength": MAX_PREDICTION_CHARS}, _PARTS)]
Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompt),
    _union(
        _FULL,
        {"type": "array", "items": _FULL, "minItems": 1, "maxItems": MAX_PROMPTS},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
    ),
]


def _tell_of_nothing(schema: dict[str, Any]) -> None:
    """Say in a model's JSON schema what `server.api.fields` lets pass."""
    schema["additionalProperties"] = NOTHING


def _tell_of_turns(schema: dict[str, Any]) -> None:
    _tell_of_nothing(schema)
    names = sorted(WITHOUT_EFFECT_IN_ANSWER - schema["properties"].keys())
    schema["properties"].update(dict.fromkeys(names, _WITHOUT_EFFECT_IN_ANSWER))
    schema["properties"].update(dict.fromkeys(sorted(WITHOUT_EFFECT_IN_MESSAGE), _WITHOUT_EFFECT))


def _tell_of_requests(schema: dict[str, Any]) -> None:
    _tell_of_nothing(schema)
    schema["properties"].update(dict.fromkeys(sorted(WITHOUT_EFFECT), _WITHOUT_EFFECT))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_tell_of_nothing)


class Message(_Strict):
    """One turn of a conversation. Only a turn of the assistant may go without content."""

    model_config = ConfigDict(json_schema_extra=_tell_of_turns)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content, Field(validate_default=True)] = None  # type: ignore[assignment]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{0,64}$")] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Annotated[str, Field(max_length=MAX_ID_CHARS)] | None = None
    reasoning_content: Text | None = None


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Speculative(_Strict):
    """How this request is drafted. It changes the speed of an answer, never its text."""

    enabled: bool | None = None
    drafter: str | None = None
    max_nodes: Annotated[int, Field(ge=1, le=64)] | None = None
    metrics: bool | None = None


class Prediction(_Strict):
    """What the client expects the answer to be. It changes the speed of an answer, never its text."""

    type: Literal["content"]
    content: Predicted


class Common(Structured):
    """Fields of both generation routes."""

    model_config = ConfigDict(json_schema_extra=_tell_of_requests)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: _Unit | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: _Unit | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: (
        Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY, allow_inf_nan=False)] | None
    ) = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=MAX_LOGIT_BIAS)
        ]
        | None
    ) = None
    allowed_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_ALLOWED_TOKEN_IDS)] | None = (
        None
    )
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    cache_salt: Annotated[Text, Field(max_length=MAX_SALT_CHARS)] | None = None
    prediction: Prediction | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    speculative: Speculative | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
