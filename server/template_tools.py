"""Calls of tools in a conversation, in the forms in which chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]
"""One turn of a chat: `role`, `content` and whatever else a template may read."""

PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "qxtzj",
        "description": "qxdzj",
        "parameters": {"type": "object", "properties": {"qxpzj": {"type": "string", "description": "qxezj"}}},
    },
}
"""A tool to try a template with."""
_PROBE_KEY = "qxkzj"
_WRITTEN_AS_PYTHON = f"'{_PROBE_KEY}'"
_MAX_DEPTH = 64
"""Of arguments that are read; deeper ones stay text."""
_ID_DIGITS = 9
"""Letters of a call's id in a trial: the templates of one family ask for just so many."""


def with_arguments_read(message: Message) -> Message:
    """The arguments of calls as objects, as most templates expect them; what is no object stays text."""
    return _each_call(message, _read)


def with_arguments_written(message: Message) -> Message:
    """The arguments of calls as JSON text, for templates that put them into the prompt as they are."""
    return _each_call(message, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def split_calls(message: Message) -> list[Message]:
    """A turn with text and calls as two, for templates that take only one of them from a turn."""
    if not message.get("tool_calls") or not message.get("content"):
        return [message]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return [rest, {"role": message["role"], "content": "", "tool_calls": message["tool_calls"]}]


def probe_calls(index: int, num_calls: int) -> list[dict[str, Any]]:
    """Calls of the turn `index` of a trial, with marks as names and arguments."""
    return [
        {
            "id": f"{call:0{_ID_DIGITS}}",
            "type": "function",
            "function": {"name": f"qx{index}n{call}zj", "arguments": {_PROBE_KEY: f"qx{index}a{call}zj"}},
        }
        for call in range(num_calls)
    ]


PROBE_ID = "0" * _ID_DIGITS


def call_marks(index: int, num_calls: int) -> Iterator[str]:
    """What has to come out of such a trial."""
    for call in range(num_calls):
        yield f"qx{index}n{call}zj"
        yield f"qx{index}a{call}zj"


def is_written_as_python(text: str) -> bool:
    """Whether a template wrote the arguments of a trial as Python would, which no model was taught."""
    return _WRITTEN_AS_PYTHON in text


def _each_call(message: Message, change: Any) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = []
    for call in calls:
        function = call["function"]
        changed.append({**call, "function": {**function, "arguments": change(function["arguments"])}})
    return {**message, "tool_calls": changed}


def _read(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and not _is_deep(value) else arguments


def _is_deep(value: Any) -> bool:
    """Level by level, as it may be deeper than Python calls functions."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
