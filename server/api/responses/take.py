"""From the body of a request to a `ResponseRequest`: each object in it by its kind, with the path of what is wrong.

What can hold many entries is bounded before pydantic sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.api.fields import clean
from server.api.responses.schema import (
    MAX_INCLUDE,
    MAX_ITEMS,
    NEUTRAL,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_IN_ITEM,
    WITHOUT_EFFECT_IN_PART,
    WITHOUT_EFFECT_IN_TOOL,
    AllowedTools,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputItem,
    InputMessage,
    NamedFunction,
    PlainFormat,
    Reasoning,
    ReasoningItem,
    ReasoningText,
    ResponseRequest,
    ResponseStreamOptions,
    SchemaFormat,
    SummaryText,
    TextOptions,
)
from server.api.schema import MAX_METADATA, MAX_PARTS, Speculative
from server.api.tool_schema import MAX_TOOLS
from server.api.translation import array, kind_of, not_supported, plain_text, read, texts
from server.errors import InvalidRequest

_TEXT_KINDS = frozenset({"text", "input_text", "output_text"})


def take(body: dict[str, Any]) -> ResponseRequest:
    """The request that a body holds. Raises InvalidRequest or UnsupportedParameter for its first fault."""
    body = clean(body, ResponseRequest.model_fields.keys(), "", NEUTRAL, WITHOUT_EFFECT)
    taken = {name: value for name, value in body.items() if value is not None}
    for name, read_one in _READERS.items():
        if name in taken:
            taken[name] = read_one(taken[name])
    return read(ResponseRequest, taken, "")


def _input(value: Any) -> str | list[InputItem]:
    if isinstance(value, str):
        return plain_text(value, "input")
    if not isinstance(value, list):
        raise InvalidRequest("Invalid 'input': must be a string or an array of items.", param="input")
    return [_item(item, f"input[{index}]") for index, item in enumerate(array(value, "input", MAX_ITEMS))]


def _item(item: Any, path: str) -> InputItem:
    if isinstance(item, dict) and "type" not in item and "role" in item:
        item = {**item, "type": "message"}
    kind = kind_of(item, path)
    if kind == "message":
        return read(InputMessage, _with_texts(item, "content", path), path, None, WITHOUT_EFFECT_IN_ITEM)
    if kind == "function_call":
        return read(FunctionCall, item, path, None, WITHOUT_EFFECT_IN_ITEM)
    if kind == "function_call_output":
        return read(FunctionCallOutput, _with_texts(item, "output", path), path, None, WITHOUT_EFFECT_IN_ITEM)
    if kind == "reasoning":
        for name in ("summary", "content"):
            if item.get(name) is not None:
                model = SummaryText if name == "summary" else ReasoningText
                where = f"{path}.{name}"
                parts = array(item[name], where, MAX_PARTS)
                item = {**item, name: [read(model, part, f"{where}[{at}]") for at, part in enumerate(parts)]}
        return read(ReasoningItem, item, path, None, WITHOUT_EFFECT_IN_ITEM | {"encrypted_content"})
    if kind == "item_reference":
        raise not_supported(path, kind, "send the item itself, or 'previous_response_id'")
    raise not_supported(path, kind, "only message, function_call, function_call_output and reasoning are supported")


def _with_texts(item: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    """`item` with its texts read."""
    if item.get(name) is None:
        raise InvalidRequest(
            f"'{path}.{name}' is required: a string or an array of text parts.", param=f"{path}.{name}"
        )
    return {**item, name: texts(item[name], f"{path}.{name}", _TEXT_KINDS, WITHOUT_EFFECT_IN_PART)}


def _tools(value: Any) -> list[FunctionTool]:
    found = []
    for index, tool in enumerate(array(value, "tools", MAX_TOOLS)):
        path = f"tools[{index}]"
        kind = kind_of(tool, path)
        if kind != "function":
            raise not_supported(path, kind, "only tools of the type 'function' are supported")
        found.append(read(FunctionTool, tool, path, None, WITHOUT_EFFECT_IN_TOOL))
    return found


def _tool_choice(value: Any) -> Any:
    if isinstance(value, str):
        return value
    kind = kind_of(value, "tool_choice")
    if kind == "function":
        return read(NamedFunction, value, "tool_choice")
    if kind == "allowed_tools":
        tools = array(value.get("tools"), "tool_choice.tools", MAX_TOOLS)
        named = [read(NamedFunction, tool, f"tool_choice.tools[{index}]") for index, tool in enumerate(tools)]
        return read(AllowedTools, {**value, "tools": named}, "tool_choice")
    raise not_supported("tool_choice", kind, "only 'function' and 'allowed_tools' are supported")


def _text(value: Any) -> TextOptions:
    format_ = value.get("format") if isinstance(value, dict) else None
    if format_ is None:
        return read(TextOptions, value, "text")
    kind = kind_of(format_, "text.format")
    if kind == "json_schema":
        return read(TextOptions, {**value, "format": read(SchemaFormat, format_, "text.format")}, "text")
    return read(TextOptions, {**value, "format": read(PlainFormat, format_, "text.format")}, "text")


def _metadata(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise InvalidRequest(f"'metadata' may hold at most {MAX_METADATA} entries, got {len(value)}.", param="metadata")
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "input": _input,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "text": _text,
    "reasoning": lambda value: read(Reasoning, value, "reasoning", None, frozenset({"generate_summary", "summary"})),
    "stream_options": lambda value: read(ResponseStreamOptions, value, "stream_options"),
    "speculative": lambda value: read(Speculative, value, "speculative"),
    "include": lambda value: array(value, "include", MAX_INCLUDE),
    "metadata": _metadata,
}
