"""The objects of the Responses API: a response with what was asked for, its items, its usage."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.api.answer import Usage
from server.api.order import Order
from server.api.responses.schema import (
    AllowedTools,
    FunctionTool,
    NamedFunction,
    ResponseRequest,
    SchemaFormat,
)

Item = dict[str, Any]
"""An item of input or output as it stands in JSON."""

IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"


@dataclass(frozen=True, slots=True)
class State:
    """How far a response has come."""

    status: str
    output: Sequence[Item] = ()
    usage: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    completed_at: int | None = None


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(24)}"


def response_frame(id_: str, wish: ResponseRequest, order: Order, created_at: int) -> dict[str, Any]:
    """What a response says of itself and of its request, whatever becomes of it."""
    return {
        "id": id_,
        "object": "response",
        "created_at": created_at,
        "model": wish.model,
        "background": False,
        "instructions": wish.instructions,
        "max_output_tokens": wish.max_output_tokens,
        "max_tool_calls": None,
        "metadata": wish.metadata or {},
        "parallel_tool_calls": _is_parallel(wish),
        "previous_response_id": wish.previous_response_id,
        "prompt_cache_key": wish.prompt_cache_key,
        "reasoning": {"effort": wish.reasoning.effort if wish.reasoning else None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": wish.store is not False,
        "temperature": order.sampling.temperature,
        "text": _text(wish),
        "tool_choice": _tool_choice(wish),
        "tools": [_tool(tool) for tool in wish.tools or ()],
        "top_logprobs": wish.top_logprobs or 0,
        "top_p": order.sampling.top_p,
        "presence_penalty": order.sampling.presence_penalty,
        "frequency_penalty": order.sampling.frequency_penalty,
        "truncation": "disabled",
        "user": wish.user,
    }


def response_object(frame: dict[str, Any], state: State) -> dict[str, Any]:
    """A response as it stands."""
    reason = {"reason": "max_output_tokens"} if state.status == INCOMPLETE else None
    return {
        **frame,
        "status": state.status,
        "completed_at": state.completed_at,
        "error": state.error,
        "incomplete_details": reason,
        "output": list(state.output),
        "usage": state.usage,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """The `usage` of a response."""
    value: dict[str, Any] = {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt + usage.num_answer,
    }
    return value


def _is_parallel(wish: ResponseRequest) -> bool:
    """Whether an answer may hold several calls: by default, unless one function was named."""
    if wish.parallel_tool_calls is None:
        return not isinstance(wish.tool_choice, NamedFunction)
    return wish.parallel_tool_calls


def _text(wish: ResponseRequest) -> dict[str, Any]:
    format_: dict[str, Any] = {"type": "text"}
    given = wish.text.format if wish.text else None
    if isinstance(given, SchemaFormat):
        format_ = {
            "type": "json_schema",
            "name": given.name,
            "description": given.description,
            "schema": given.schema_,
            "strict": bool(given.strict),
        }
    elif given is not None:
        format_ = {"type": given.type}
    return {"format": format_, "verbosity": (wish.text.verbosity if wish.text else None) or "medium"}


def _tool_choice(wish: ResponseRequest) -> Any:
    choice = wish.tool_choice
    if isinstance(choice, NamedFunction | AllowedTools):
        return choice.model_dump()
    return choice or "auto"


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
