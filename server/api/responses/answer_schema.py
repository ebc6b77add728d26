"""What clients get from the Responses API, as /openapi.json tells it; tests hold the answers to this."""

from __future__ import annotations

from typing import Any, Literal

from server.api.answer_schema import ChatToken, Left, Shape

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Shape):
    """A text of the input."""

    type: Literal["input_text"]
    text: str


class OutputText(Shape):
    """A text of the model."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken] | Left = None


class ThoughtText(Shape):
    """A text of the model's thinking."""

    type: Literal["reasoning_text"]
    text: str


class SummaryPart(Shape):
    """A summary, as a client sent it: this server makes none."""

    type: Literal["summary_text"]
    text: str


class MessageItem(Shape):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputText | OutputText]
    status: ItemStatus


class CallItem(Shape):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


class CallOutputItem(Shape):
    """What a call came to."""

    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    status: ItemStatus


class ThoughtItem(Shape):
    """What the model thought."""

    id: str
    type: Literal["reasoning"]
    summary: list[SummaryPart]
    content: list[ThoughtText]
    status: ItemStatus


OutputItem = MessageItem | CallItem | ThoughtItem


class InputDetails(Shape):
    """Input tokens that the prefix cache answered."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Shape):
    """Not counted apart: 0."""

    reasoning_tokens: int


class ResponseUsage(Shape):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFailure(Shape):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded"]
    message: str


class IncompleteDetails(Shape):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(Shape):
    """What was asked for."""

    effort: str | None
    summary: None


class ResponseObject(Shape):
    """A response, with what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(Shape):
    """One event of a streamed response; which fields there are, its type says."""

    type: str
    sequence_number: int
    response: ResponseObject | Left = None
    output_index: int | Left = None
    content_index: int | Left = None
    item_id: str | Left = None
    item: OutputItem | Left = None
    part: OutputText | ThoughtText | Left = None
    delta: str | Left = None
    text: str | Left = None
    name: str | Left = None
    arguments: str | Left = None
    logprobs: list[ChatToken] | Left = None


class InputItems(Shape):
    """A page of the items of a response's input."""

    object: Literal["list"]
    data: list[MessageItem | CallItem | CallOutputItem | ThoughtItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(Shape):
    """A response that is no longer kept."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
