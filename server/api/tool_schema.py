"""Tools and calls of them, as clients send them: strict pydantic models, a part of `server.api.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from server.api.fields import NOTHING, WITHOUT_EFFECT_IN_MESSAGE

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 2**10
"""Of all tools together, as JSON."""
MAX_CALLS = 128
"""Of one message."""
MAX_ARGUMENTS_CHARS = 512 * 2**10
MAX_ID_CHARS = 256
NAME = r"^[a-zA-Z0-9_-]{1,64}$"

_Name = Annotated[str, Field(pattern=NAME)]
_WITHOUT_EFFECT = {"description": "Without effect."}


def _object_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "object") != "object":
        raise ValueError('must be a JSON schema of the type "object"')
    return value


def _tell(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = NOTHING
    schema["properties"].update(dict.fromkeys(sorted(WITHOUT_EFFECT_IN_MESSAGE - {"id"}), _WITHOUT_EFFECT))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_tell)


class FunctionDefinition(_Strict):
    """A function that the model may call. `parameters` is a JSON schema; without one there are no arguments."""

    name: _Name
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_object_schema)] | None = None
    strict: bool | None = None


class ToolDefinition(_Strict):
    """A tool: only functions are known."""

    type: Literal["function"]
    function: FunctionDefinition


class CalledFunction(_Strict):
    """What was called, with its arguments as JSON text."""

    name: _Name
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENTS_CHARS)]


class ToolCall(_Strict):
    """A call in a turn of the assistant."""

    id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    type: Literal["function"] = "function"
    function: CalledFunction


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tools may or have to be called."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    """Of the tools that alone may be called; None is all."""
    is_one_function: bool = False
    """One function was named: it is called once, unless several calls are asked for."""


def _choice(value: Any) -> Choice:
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return Choice(value)  # type: ignore[arg-type]  # one of the three
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function" and _is_named(value):
        return Choice("required", (value["function"]["name"],), is_one_function=True)
    allowed = value.get("allowed_tools") if kind == "allowed_tools" and value.keys() <= _ALLOWED else None
    if isinstance(allowed, dict) and allowed.keys() == {"mode", "tools"} and allowed["mode"] in ("auto", "required"):
        tools = allowed["tools"]
        if isinstance(tools, list) and 1 <= len(tools) <= MAX_TOOLS and all(map(_is_named, tools)):
            return Choice(allowed["mode"], tuple(tool["function"]["name"] for tool in tools))
    raise ValueError(
        'must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or {"type": '
        '"allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
    )


_ALLOWED = {"type", "allowed_tools"}


def _is_named(value: Any) -> bool:
    """Whether it is {"type": "function", "function": {"name": ...}}."""
    if not isinstance(value, dict) or value.keys() != {"type", "function"} or value["type"] != "function":
        return False
    function = value["function"]
    return isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str)


def _closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with just these fields."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_NAMED = _closed(type={"const": "function"}, function=_closed(name={"type": "string", "pattern": NAME}))
_NAMED_LIST = {"type": "array", "items": _NAMED, "minItems": 1, "maxItems": MAX_TOOLS}
_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        _NAMED,
        _closed(
            type={"const": "allowed_tools"},
            allowed_tools=_closed(mode={"enum": ["auto", "required"]}, tools=_NAMED_LIST),
        ),
    ]
}
ToolChoice = Annotated[Any, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA, mode="validation")]
"""A Choice once it is validated; named so it would be an object of its own in /openapi.json."""
