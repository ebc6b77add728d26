"""From the body of a request to a `MessageRequest`: each object in it by its kind, with the path of what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from server.api.fields import asks_nothing, clean
from server.api.messages.schema import (
    MAX_BLOCKS,
    NEUTRAL,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_IN_BLOCK,
    WITHOUT_EFFECT_IN_THINKING,
    WITHOUT_EFFECT_IN_TOOL,
    Block,
    CountRequest,
    OutputConfig,
    OutputFormat,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ThinkingParam,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from server.api.schema import MAX_MESSAGES, Speculative
from server.api.tool_schema import MAX_TOOLS
from server.api.translation import array, kind_of, not_supported, plain_text, read, texts
from server.errors import InvalidRequest, NoThreads

Model = TypeVar("Model", bound=CountRequest)

_BLOCKS: dict[str, dict[str, type[Block]]] = {
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {
        "text": TextBlock,
        "tool_use": ToolUseBlock,
        "thinking": ThinkingBlock,
        "redacted_thinking": RedactedThinkingBlock,
    },
    "system": {"text": TextBlock},
}
_TEXT = frozenset({"text"})
_NOT_TEXT = frozenset({"image", "document"})


def take(model: type[Model], body: dict[str, Any]) -> Model:
    """The request that a body holds. Raises InvalidRequest or UnsupportedParameter for its first fault."""
    if not asks_nothing(body.get("thread")):
        raise NoThreads
    body = clean(body, model.model_fields.keys(), "", NEUTRAL, WITHOUT_EFFECT)
    taken = {name: value for name, value in body.items() if value is not None}
    for name, read_one in _READERS.items():
        if name in taken:
            taken[name] = read_one(taken[name])
    return read(model, taken, "")


def _messages(value: Any) -> list[Turn]:
    turns = array(value, "messages", MAX_MESSAGES)
    return [_turn(turn, f"messages[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, path: str) -> Turn:
    content = turn.get("content") if isinstance(turn, dict) else None
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(content, str | list):
        return read(Turn, turn, path)
    if isinstance(content, str):
        return read(Turn, {**turn, "content": plain_text(content, f"{path}.content")}, path)
    kinds = _BLOCKS.get(role) if isinstance(role, str) else None
    if kinds is None:
        read(Turn, {**turn, "content": ""}, path)  # names what is wrong with the role
        raise AssertionError("every role has its blocks")
    blocks = array(content, f"{path}.content", MAX_BLOCKS)
    read_blocks = [_block(block, f"{path}.content[{index}]", kinds) for index, block in enumerate(blocks)]
    return read(Turn, {**turn, "content": read_blocks}, path)


def _block(block: Any, path: str, kinds: dict[str, type[Block]]) -> Block:
    kind = kind_of(block, path)
    model = kinds.get(kind)
    if kind in _NOT_TEXT:
        raise not_supported(path, kind, "this model reads text only")
    if model is None:
        raise not_supported(path, kind, f"a turn of this role may hold {', '.join(kinds)}")
    if model is ToolResultBlock and block.get("content") is not None:
        content = texts(block["content"], f"{path}.content", _TEXT, WITHOUT_EFFECT_IN_BLOCK)
        block = {**block, "content": content}
    elif "text" in block:
        plain_text(block["text"], f"{path}.text")
    return read(model, {name: value for name, value in block.items() if value is not None}, path, None, _unread(model))


def _unread(model: type[Block]) -> frozenset[str]:
    return frozenset() if model is RedactedThinkingBlock else WITHOUT_EFFECT_IN_BLOCK


def _tools(value: Any) -> list[ToolParam]:
    found = []
    for index, tool in enumerate(array(value, "tools", MAX_TOOLS)):
        path = f"tools[{index}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "custom":
            raise not_supported(path, kind, "only tools that the client runs, with an 'input_schema', are supported")
        found.append(read(ToolParam, tool, path, None, WITHOUT_EFFECT_IN_TOOL))
    return found


def _tool_choice(value: Any) -> ToolChoiceParam:
    choice = read(ToolChoiceParam, value, "tool_choice")
    if (choice.type == "tool") != (choice.name is not None):
        raise InvalidRequest("'tool_choice.name' goes with the type 'tool', and with no other.", param="tool_choice")
    return choice


def _output_config(value: Any) -> OutputConfig:
    if isinstance(value, dict) and value.get("format") is not None:
        value = {**value, "format": read(OutputFormat, value["format"], "output_config.format")}
    return read(OutputConfig, value, "output_config")


def _stops(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise InvalidRequest("Invalid 'stop_sequences': must be an array.", param="stop_sequences")
    return [plain_text(stop, f"stop_sequences[{index}]") for index, stop in enumerate(value)]


_READERS: dict[str, Callable[[Any], Any]] = {
    "messages": _messages,
    "system": lambda value: texts(value, "system", _TEXT, WITHOUT_EFFECT_IN_BLOCK),
    "tools": _tools,
    "tool_choice": _tool_choice,
    "thinking": lambda value: read(ThinkingParam, value, "thinking", None, WITHOUT_EFFECT_IN_THINKING),
    "output_config": _output_config,
    "stop_sequences": _stops,
    "speculative": lambda value: read(Speculative, value, "speculative"),
}
