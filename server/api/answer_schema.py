"""What clients get, as /openapi.json tells it. Answers are written as bytes elsewhere; tests hold them to this."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import SkipJsonSchema

Left = SkipJsonSchema[None]
"""The other value of a field that is left out, never null."""

FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


def _without_null(schema: dict[str, Any]) -> None:
    """A field that may be left out has no default: it is not null then, it is not there."""
    for one in schema["properties"].values():
        if one.get("default", "") is None:
            del one["default"]


class Shape(BaseModel):
    """What an answer, or a part of it, has: all of it, and nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=_without_null)


class ErrorInfo(Shape):
    """What went wrong; `param` names the field."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorAnswer(Shape):
    """Every error; in a stream, the last event before [DONE]."""

    error: ErrorInfo


class PromptDetails(Shape):
    """Prompt tokens that the prefix cache answered."""

    cached_tokens: int


class AnswerDetails(Shape):
    """What became of the tokens that were copied from the request's `prediction`."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageInfo(Shape):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails | Left = None


class SpeculativeDecoding(Shape):
    """What speculation did for a request."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int


class AnswerMetrics(Shape):
    """With `speculative.metrics` only."""

    speculative_decoding: SpeculativeDecoding


class Alternative(Shape):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[Alternative]


class PromptAlternative(Shape):
    """A token at one place of a prompt; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptAlternative] | None]
"""With `prompt_logprobs` only: for each token but the first the likeliest ones and itself, by token id."""


class ChatLogprobs(Shape):
    """Log-probabilities of a message."""

    content: list[ChatToken]
    refusal: None


class CalledFunction(Shape):
    """What is to be called, with its arguments as JSON text."""

    name: str
    arguments: str


class CallInAnswer(Shape):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Shape):
    """The answer to a conversation. Where there are calls or thinking, `content` may be null."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | Left = None
    tool_calls: list[CallInAnswer] | Left = None
    refusal: None


class ChatChoice(Shape):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    token_ids: list[int] | Left = None


class _Answer(Shape):
    id: str
    created: int
    model: str


class ChatCompletion(_Answer):
    """The answer to POST /v1/chat/completions without `stream`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageInfo
    metrics: AnswerMetrics | Left = None
    prompt_token_ids: list[int] | Left = None
    prompt_logprobs: PromptLogprobs | Left = None


class FunctionDelta(Shape):
    """The name, with the first chunk of a call; then pieces of the arguments."""

    name: str | Left = None
    arguments: str


class CallDelta(Shape):
    """A call that begins, with `id`, `type` and name; or more of its arguments."""

    index: int
    id: str | Left = None
    type: Literal["function"] | Left = None
    function: FunctionDelta


class ChatDelta(Shape):
    """What is new in the message."""

    role: Literal["assistant"] | Left = None
    content: str | Left = None
    reasoning_content: str | Left = None
    tool_calls: list[CallDelta] | Left = None


class ChatChunkChoice(Shape):
    """A piece of one of `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: list[int] | Left = None


class ChatChunk(_Answer):
    """One event of a streamed chat completion; `usage` is there with `stream_options.include_usage` only."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageInfo | None = None
    metrics: AnswerMetrics | Left = None
    prompt_token_ids: list[int] | Left = None
    obfuscation: str | Left = None


class TextLogprobs(Shape):
    """Log-probabilities of a text, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _TextPiece(Shape):
    index: int
    text: str
    logprobs: TextLogprobs | None
    token_ids: list[int] | Left = None
    prompt_token_ids: list[int] | Left = None


class TextChoice(_TextPiece):
    """One text of a prompt."""

    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | Left = None


class TextChunkChoice(_TextPiece):
    """A piece of one text."""

    finish_reason: FinishReason | None


class TextCompletion(_Answer):
    """The answer to POST /v1/completions without `stream`."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: UsageInfo
    metrics: AnswerMetrics | Left = None


class TextChunk(_Answer):
    """One event of a streamed completion; `usage` is there with `stream_options.include_usage` only."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: UsageInfo | None = None
    metrics: AnswerMetrics | Left = None
    obfuscation: str | Left = None


class Tokenized(Shape):
    """The answer to POST /tokenize; names of tokens with `return_token_strs` only."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | Left = None


class Detokenized(Shape):
    """The answer to POST /detokenize."""

    prompt: str


class Rendered(Shape):
    """The answer to POST /v1/chat/completions/render: the prompt as the model reads it."""

    model: str
    prompt: str
    token_ids: list[int]


class ModelCard(Shape):
    """A name under which the model is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["foretoken"] = "foretoken"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(Shape):
    """Every name under which the model is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(Shape):
    """The answer of a probe."""

    status: Literal["ready"]


class Health(Shape):
    """The answer of a probe of life."""

    status: Literal["ok"]
    backend: str | None = None
    """What runs the model: cpu, cuda, torch or parallel; null while it loads."""
    drafting: bool | None = None
    """Whether drafters draft: not yet, while a worker that has just begun to serve compiles beside it."""


class Version(Shape):
    """The version of this server."""

    version: str


_ERRORS = {
    400: "A field is wrong, not supported or too long; or the body is not JSON.",
    401: "No API key, or not one of the server's, where it has keys.",
    404: "No such model is served.",
    413: "The body is larger than the limit.",
    429: "The queue is full.",
    500: "A fault of the server, or a request that could not be finished.",
    503: "The model is loading, the server is draining, or its worker is gone for good.",
}
_RETRY = {
    "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}},
    "retry-after-ms": {"description": "The same in milliseconds.", "schema": {"type": "integer"}},
}

Responses = dict[int | str, dict[str, Any]]
"""The `responses` of a FastAPI route."""

ANSWER_ERRORS = (400, 401, 404, 413, 429, 500, 503)
"""What both generation routes can answer besides 200."""


def errors(*statuses: int) -> Responses:
    """These error answers."""
    found: Responses = {}
    for status in statuses:
        found[status] = {"model": ErrorAnswer, "description": _ERRORS[status]}
        if status in (429, 503):
            found[status]["headers"] = _RETRY
    return found


def answers(whole: type[BaseModel], chunk: type[BaseModel]) -> Responses:
    """The answers of a generation route: in one piece, as a stream of chunks, or an error."""
    event = {"anyOf": [{"$ref": f"#/components/schemas/{one.__name__}"} for one in (chunk, ErrorAnswer)]}
    told = {
        "model": whole,
        "description": "The answer; with `stream`, events whose data are chunks, then `[DONE]`.",
        "content": {"text/event-stream": {"schema": event}},
    }
    return {200: told, **errors(*ANSWER_ERRORS)}
