"""Tools and calls of a request, before pydantic sees them: bounded, and without what asks for nothing."""

from __future__ import annotations

from typing import Any

import msgspec

from server.api.fields import WITHOUT_EFFECT_IN_MESSAGE, asks_nothing, clean, unsupported
from server.api.tool_schema import (
    MAX_ARGUMENTS_CHARS,
    MAX_CALLS,
    MAX_TOOLS_BYTES,
    CalledFunction,
    FunctionDefinition,
    ToolCall,
    ToolDefinition,
)
from server.errors import InvalidRequest

MAX_KWARGS_BYTES = 4096
_WITHOUT_EFFECT_IN_TOOL = WITHOUT_EFFECT_IN_MESSAGE
_WITHOUT_EFFECT_IN_CALL = (WITHOUT_EFFECT_IN_MESSAGE - {"id"}) | {"index", "extra_content"}
_OLDER = {"functions": "tools", "function_call": "tool_choice"}


def refuse_older(body: dict[str, Any]) -> None:
    """Name what has come in the place of OpenAI's first fields for tools. Raises UnsupportedParameter."""
    for old, new in _OLDER.items():
        value = body.get(old)
        if not asks_nothing(value) and value != "none":
            raise unsupported(old, f"'{old}' is not supported: use '{new}', which came in its place.")


def clean_tools(body: dict[str, Any]) -> dict[str, Any]:
    """`body` with tools that hold known fields alone. Raises InvalidRequest over a limit."""
    kwargs = body.get("chat_template_kwargs")
    if isinstance(kwargs, dict) and (size := len(msgspec.json.encode(kwargs))) > MAX_KWARGS_BYTES:
        raise InvalidRequest(
            f"'chat_template_kwargs' may have at most {MAX_KWARGS_BYTES} bytes as JSON, got {size}.",
            param="chat_template_kwargs",
        )
    tools = body.get("tools")
    if not isinstance(tools, list):
        return body
    encoded = msgspec.json.encode(tools)
    if len(encoded) > MAX_TOOLS_BYTES:
        raise InvalidRequest(
            f"'tools' may have at most {MAX_TOOLS_BYTES} bytes as JSON, got {len(encoded)}.", param="tools"
        )
    if b"\\u0000" in encoded:
        raise InvalidRequest("'tools' must not hold the character NUL.", param="tools")
    return {**body, "tools": [_clean_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]}


def _clean_tool(tool: Any, path: str) -> Any:
    if not isinstance(tool, dict):
        return tool
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "function":
        raise unsupported(f"{path}.type", f"'{path}.type' is '{kind[:80]}'; only functions can be called.")
    tool = clean(tool, ToolDefinition.model_fields.keys(), f"{path}.", {}, _WITHOUT_EFFECT_IN_TOOL)
    if isinstance(function := tool.get("function"), dict):
        known = FunctionDefinition.model_fields.keys()
        tool["function"] = clean(function, known, f"{path}.function.", {}, _WITHOUT_EFFECT_IN_TOOL)
    return tool


def clean_turn(message: dict[str, Any], path: str) -> dict[str, Any]:
    """A message whose calls hold known fields alone, and which has what its role asks for. Raises InvalidRequest."""
    role = message.get("role")
    if role == "function":
        raise unsupported(f"{path}.role", f"'{path}.role' is 'function': use 'tool', which came in its place.")
    message = dict(message)
    for name, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool"), ("reasoning_content", "assistant")):
        if role != owner and name in message:
            if not asks_nothing(message[name]):
                raise unsupported(f"{path}.{name}", f"'{path}.{name}' belongs to the role '{owner}'.")
            del message[name]
    if not isinstance(message.get("reasoning_content"), str | None):
        del message["reasoning_content"]  # what other servers put there is without effect
    if role == "tool" and not message.get("tool_call_id"):
        param = f"{path}.tool_call_id"
        raise InvalidRequest(f"'{param}' is required: it says which call this is the result of.", param=param)
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = _clean_calls(calls, f"{path}.tool_calls")
    return message


def _clean_calls(calls: list[Any], path: str) -> list[Any]:
    if len(calls) > MAX_CALLS:
        raise InvalidRequest(f"'{path}' may hold at most {MAX_CALLS} entries, got {len(calls)}.", param=path)
    cleaned = []
    for index, call in enumerate(calls):
        if isinstance(call, dict):
            where = f"{path}[{index}]."
            call = clean(call, ToolCall.model_fields.keys(), where, {}, _WITHOUT_EFFECT_IN_CALL)
            call = {name: value for name, value in call.items() if name != "type" or value is not None}
            if isinstance(function := call.get("function"), dict):
                known = CalledFunction.model_fields.keys()
                call["function"] = clean(function, known, f"{where}function.", {}, _WITHOUT_EFFECT_IN_CALL)
                _check_arguments(function.get("arguments"), f"{where}function.arguments")
        cleaned.append(call)
    return cleaned


def _check_arguments(arguments: Any, param: str) -> None:
    if isinstance(arguments, str) and len(arguments) > MAX_ARGUMENTS_CHARS:
        raise InvalidRequest(
            f"'{param}' may have at most {MAX_ARGUMENTS_CHARS} characters, got {len(arguments)}.", param=param
        )
