"""What clients may send to the Messages API: strict models, which are also the truth of /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from server.api.schema import MAX_MESSAGES, MAX_STOP_CHARS, MAX_TOKENS, Speculative
from server.api.tool_schema import MAX_TOOLS
from server.api.translation import Strict, told_without_effect

MAX_BLOCKS = 256

WITHOUT_EFFECT = frozenset({"cache_control", "inference_geo", "metadata", "service_tier"})
WITHOUT_EFFECT_IN_BLOCK = frozenset({"cache_control", "caller", "citations", "is_error", "signature"})
"""What a call came to is told by its text alone: templates have no place for `is_error`."""
WITHOUT_EFFECT_IN_TOOL = frozenset(
    {"allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples"}
)
WITHOUT_EFFECT_IN_THINKING = frozenset({"budget_tokens"})

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},),
    "mcp_servers": (),
    "speed": ("standard",),
    "thread": (),
}
"""Fields that Anthropic knows and nobody honours here, with the values that say what happens anyway."""

_TEXT_BLOCK = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
Texts = Annotated[
    list[str],
    PlainValidator(lambda value: value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_BLOCK}]}),
]
"""A text or text blocks; they come here read already (`translation.texts`)."""


class TextBlock(Strict):
    """A text."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_BLOCK)

    type: Literal["text"]
    text: str


class ToolUseBlock(Strict):
    """A call that the model made."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_BLOCK)

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Strict):
    """What a call came to."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_BLOCK)

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None


class ThinkingBlock(Strict):
    """What the model thought."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_BLOCK)

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Strict):
    """What another model thought; it cannot be read, and is without effect."""

    type: Literal["redacted_thinking"]
    data: str


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock


class Turn(Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_BLOCKS)]


class ToolParam(Strict):
    """A tool that the client runs."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_TOOL)

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoiceParam(Strict):
    """Which tools may or have to be called; `name` is for the type `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(Strict):
    """Whether the model thinks. A model keeps to no budget: `budget_tokens` is without effect."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_THINKING)

    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    """How the answer is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens: what makes up a prompt."""

    model_config = told_without_effect(WITHOUT_EFFECT)

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[ToolParam], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None


class MessageRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = None
    """How many there may be is a setting."""
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    seed: int | None = None
    speculative: Speculative | None = None
