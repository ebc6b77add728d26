"""What clients get from the Messages API, as /openapi.json tells it; tests hold the answers to this."""

from __future__ import annotations

from typing import Any, Literal

from server.api.answer_schema import ANSWER_ERRORS, Left, Responses, Shape, errors


class MessageText(Shape):
    """A text of the model."""

    type: Literal["text"]
    text: str


class MessageThought(Shape):
    """What the model thought; nothing is signed."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class MessageCall(Shape):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


MessageBlock = MessageText | MessageThought | MessageCall
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(Shape):
    """Tokens of a message; `input_tokens` are those that the prefix cache did not answer."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(Shape):
    """The answer to POST /v1/messages without `stream`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageDelta(Shape):
    """What is new in a block, or why the message ended."""

    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | Left = None
    text: str | Left = None
    thinking: str | Left = None
    partial_json: str | Left = None
    stop_reason: StopReason | Left = None
    stop_sequence: str | None = None


class ThreadRefusal(Shape):
    """Why no thread was begun; the anthropic library reads it, and goes on without one."""

    error_code: Literal["thread_unsupported_request"]
    unsupported: list[str]


class MessageError(Shape):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "overloaded_error",
        "api_error",
    ]
    message: str
    details: ThreadRefusal | Left = None


class MessageErrorAnswer(Shape):
    """Every error of these routes; in a stream, the last event."""

    type: Literal["error"]
    error: MessageError


class MessageEvent(Shape):
    """One event of a streamed message; which fields there are, its type says."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
        "error",
    ]
    message: MessageAnswer | Left = None
    index: int | Left = None
    content_block: MessageBlock | Left = None
    delta: MessageDelta | Left = None
    usage: MessageUsage | Left = None
    error: MessageError | Left = None


class TokenCount(Shape):
    """The answer to POST /v1/messages/count_tokens."""

    input_tokens: int


def message_errors(*statuses: int) -> Responses:
    """These error answers, in Anthropic's shape."""
    return {status: {**told, "model": MessageErrorAnswer} for status, told in errors(*statuses).items()}


def message_answers() -> Responses:
    """The answers of POST /v1/messages."""
    told = {
        "model": MessageAnswer,
        "description": "The message; with `stream`, events.",
        "content": {"text/event-stream": {"schema": {"$ref": f"#/components/schemas/{MessageEvent.__name__}"}}},
    }
    return {200: told, **message_errors(*ANSWER_ERRORS)}
