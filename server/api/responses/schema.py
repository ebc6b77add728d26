"""What clients may send to the Responses API: strict models, which are also the truth of /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from server.api.schema import MAX_LOGPROBS, MAX_METADATA, MAX_TOKENS, Speculative
from server.api.tool_schema import MAX_TOOLS
from server.api.translation import Strict, told_without_effect

MAX_ITEMS = 4096
MAX_INCLUDE = 16

WITHOUT_EFFECT = frozenset(
    {
        "client_metadata",
        "max_tool_calls",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
    }
)
"""Of a request; there are no tools of the server's own to count the calls of."""
WITHOUT_EFFECT_IN_ITEM = frozenset({"id", "internal_chat_message_metadata_passthrough", "phase", "status"})
WITHOUT_EFFECT_IN_PART = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})
WITHOUT_EFFECT_IN_TOOL = frozenset({"allowed_callers", "defer_loading", "output_schema"})

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "moderation": (),
    "prompt": (),
    "truncation": ("disabled",),
}
"""Fields that OpenAI knows and nobody honours here, with the values that say what happens anyway."""

Include = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""All but the second add nothing: reasoning is plain text here, and the others belong to tools that are refused."""

_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["input_text", "output_text", "text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}
Texts = Annotated[list[str], PlainValidator(lambda value: value), WithJsonSchema(TEXTS)]
"""A text or text parts; they come here read already (`translation.texts`)."""


class InputMessage(Strict):
    """A turn of the conversation."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_ITEM)

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts


class FunctionCall(Strict):
    """A call that the model made."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_ITEM)

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(Strict):
    """What a call came to."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_ITEM)

    type: Literal["function_call_output"]
    call_id: str
    output: Texts


class SummaryText(Strict):
    """A part of a summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Strict):
    """A part of the model's thinking."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What the model thought, as an earlier answer brought it."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_ITEM | {"encrypted_content"})

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None


InputItem = InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem


class FunctionTool(Strict):
    """A function that the model may call."""

    model_config = told_without_effect(WITHOUT_EFFECT_IN_TOOL)

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class AllowedTools(Strict):
    """Those of the tools that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(max_length=MAX_TOOLS)]


class PlainFormat(Strict):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """How the answer is written."""

    format: PlainFormat | SchemaFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """How much the model thinks. There are no summaries: `summary` and `generate_summary` are without effect."""

    model_config = told_without_effect(frozenset({"generate_summary", "summary"}))

    effort: str | None = None


class ResponseStreamOptions(Strict):
    """What a stream carries besides the answer."""

    include_obfuscation: Literal[False] | None = None


_Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class ResponseRequest(Strict):
    """POST /v1/responses."""

    model_config = told_without_effect(WITHOUT_EFFECT)

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[Include], Field(max_length=MAX_INCLUDE)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: _Unit | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: _Unit | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: int | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    speculative: Speculative | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
