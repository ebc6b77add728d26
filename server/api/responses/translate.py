"""A request of the Responses API as a chat request, and the names of its fields for errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.responses.items import chat_messages
from server.api.responses.objects import Item
from server.api.responses.schema import AllowedTools, FunctionTool, NamedFunction, ResponseRequest, SchemaFormat
from server.api.schema import ChatRequest
from server.api.translation import as_chat

NAMES = {
    "chat_template_kwargs": "reasoning",
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "tools[].function": "tools[]",
    "verbosity": "text.verbosity",
}
"""Fields of chat, as the client knows them."""


def chat_request(wish: ResponseRequest, items: Sequence[Item]) -> ChatRequest:
    """The chat request that asks for the same, after these items. Raises what chat refuses."""
    has_logprobs = "message.output_text.logprobs" in (wish.include or ()) or bool(wish.top_logprobs)
    return as_chat(
        {
            "model": wish.model,
            "messages": chat_messages(wish.instructions, items),
            "stream": wish.stream,
            "max_completion_tokens": wish.max_output_tokens,
            "temperature": wish.temperature,
            "top_p": wish.top_p,
            "top_k": wish.top_k,
            "min_p": wish.min_p,
            "presence_penalty": wish.presence_penalty,
            "frequency_penalty": wish.frequency_penalty,
            "seed": wish.seed,
            "logprobs": has_logprobs or None,
            "top_logprobs": wish.top_logprobs if has_logprobs else None,
            "tools": [_tool(tool) for tool in wish.tools] if wish.tools else None,
            "tool_choice": _tool_choice(wish.tool_choice),
            "parallel_tool_calls": wish.parallel_tool_calls,
            "response_format": _response_format(wish),
            "verbosity": wish.text.verbosity if wish.text else None,
            "reasoning_effort": wish.reasoning.effort if wish.reasoning else None,
            "speculative": wish.speculative.model_dump() if wish.speculative else None,
        },
        NAMES,
    )


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(choice: str | NamedFunction | AllowedTools | None) -> Any:
    if isinstance(choice, NamedFunction):
        return _named(choice)
    if isinstance(choice, AllowedTools):
        tools = [_named(tool) for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _named(function: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}


def _response_format(wish: ResponseRequest) -> dict[str, Any] | None:
    given = wish.text.format if wish.text else None
    if isinstance(given, SchemaFormat):
        return {
            "type": "json_schema",
            "json_schema": given.model_dump(by_alias=True, exclude={"type"}, exclude_none=True),
        }
    return None if given is None else {"type": given.type}
