"""From a JSON object to a validated model, with errors that name the field and its limit."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from server.api.fields import (
    MAX_PATH,
    NEUTRAL,
    NEUTRAL_IN_MESSAGE,
    REASONING_PARTS,
    TEXT_PARTS,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_IN_ANSWER,
    WITHOUT_EFFECT_IN_MESSAGE,
    clean,
    unknown,
    unsupported,
)
from server.api.schema import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    MAX_STOP_IDS,
    Message,
    Prediction,
    Speculative,
    StreamOptions,
)
from server.api.structured_schema import clean_structured
from server.api.token_schema import MAX_TOKENS_READ
from server.api.tool_parse import clean_tools, clean_turn, refuse_older
from server.api.tool_schema import MAX_TOOLS
from server.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

_MAX_SHOWN = 80
_PLAIN_PART = frozenset({"type", "text"})

_MAX_ENTRIES = {
    "messages": MAX_MESSAGES,
    "tokens": MAX_TOKENS_READ,
    "tools": MAX_TOOLS,
    "stop_token_ids": MAX_STOP_IDS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "bad_words": MAX_BAD_WORDS,
    "logit_bias": MAX_LOGIT_BIAS,
    "metadata": MAX_METADATA,
}
_OBJECTS: dict[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "speculative": Speculative,
    "prediction": Prediction,
}

_PLAIN = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "float_type": "must be a number",
    "int_from_float": "must be an integer",
    "int_type": "must be an integer",
    "list_type": "must be an array",
    "model_type": "must be an object",
    "string_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be {expected}",
    "less_than_equal": "must be at most {le}",
    "too_long": "must have at most {max_length} entries, got {actual_length}",
    "too_short": "must have at least {min_length} entries, got {actual_length}",
}
"""What a client reads for each kind of fault: it sent JSON, and knows nothing of lists, dictionaries and instances."""


def parse(model: type[Model], body: dict[str, Any]) -> Model:
    """Validate `body`. Raises InvalidRequest or UnsupportedParameter for the first fault.

    Pydantic collects every fault before it tells the first one, which takes seconds for a body of a million faults.
    What can hold that many is therefore bounded here, before it sees the body.
    """
    refuse_older(body)
    body = clean(body, model.model_fields.keys(), "", NEUTRAL, WITHOUT_EFFECT)
    _check_sizes(body)
    body = _clean_inside(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise explain(error) from None


def _check_sizes(body: dict[str, Any]) -> None:
    for name, most in _MAX_ENTRIES.items():
        entries = body.get(name)
        if isinstance(entries, dict | list) and len(entries) > most:
            raise InvalidRequest(f"'{name}' may hold at most {most} entries, got {len(entries)}.", param=name)


def _clean_inside(body: dict[str, Any]) -> dict[str, Any]:
    """`body` with objects and messages that hold known fields alone; what is not honoured is refused by name."""
    cleaned = {**(clean_tools(body) if "messages" in body else body), **clean_structured(body)}
    for name, model in _OBJECTS.items():
        if isinstance(value := body.get(name), dict):
            value = clean(value, model.model_fields.keys(), f"{name}.", {}, frozenset())
            cleaned[name] = _with_clean_parts(value, name, WITHOUT_EFFECT_IN_MESSAGE)
    messages = body.get("messages")
    if isinstance(messages, list):
        cleaned["messages"] = [
            _clean_message(message, f"messages[{index}]") if isinstance(message, dict) else message
            for index, message in enumerate(messages)
        ]
    return cleaned


def _clean_message(message: dict[str, Any], path: str) -> dict[str, Any]:
    role = message.get("role")
    message = clean_turn(message, path)
    without_effect = WITHOUT_EFFECT_IN_ANSWER if role == "assistant" else WITHOUT_EFFECT_IN_MESSAGE
    message = _with_clean_parts(message, path, without_effect)
    return clean(message, Message.model_fields.keys(), f"{path}.", NEUTRAL_IN_MESSAGE, without_effect)


def _with_clean_parts(value: dict[str, Any], path: str, without_effect: Set[str]) -> dict[str, Any]:
    """`value` whose content, if it is a list of parts, holds plain text parts; too long a list is left as it is."""
    content = value.get("content")
    if not isinstance(content, list) or len(content) > MAX_PARTS or all(map(_is_plain, content)):
        return value
    is_answer = without_effect is WITHOUT_EFFECT_IN_ANSWER
    parts = [
        _clean_part(part, f"{path}.content[{index}]", without_effect) if isinstance(part, dict) else part
        for index, part in enumerate(content)
        if not (is_answer and _is_reasoning(part))
    ]
    return {**value, "content": parts}


def _is_plain(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == _PLAIN_PART and part["type"] == "text"


def _is_reasoning(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and kind in REASONING_PARTS


def _clean_part(part: dict[str, Any], path: str, without_effect: Set[str]) -> dict[str, Any]:
    """A part as `{"type": "text", "text": ...}`, if it is one of text; of other parts the type is named."""
    kind = part.get("type")
    if kind in TEXT_PARTS:
        part = {**part, "type": "text"}
    elif isinstance(kind, str):
        raise unsupported(path, f"'{path}' is of type '{kind[:_MAX_SHOWN]}'; this model reads text only.")
    return clean(part, _PLAIN_PART, f"{path}.", {}, without_effect)


def explain(error: ValidationError, path: str = "") -> InvalidRequest:
    """The first fault, in one sentence; `path` is where in the body the value stands."""
    first = error.errors(include_url=False, include_context=True)[0]
    param = _path((path, *first["loc"]) if path else first["loc"])
    kind = first["type"]
    if kind == "extra_forbidden":
        return unknown(param)
    if kind == "missing":
        return InvalidRequest(f"'{param}' is required.", param=param)
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if kind in _PLAIN:
        reason = _PLAIN[kind].format(**{name: _plain(value) for name, value in first.get("ctx", {}).items()})
    given = "" if kind in ("value_error", "too_long", "too_short") else f", got {_show(first['input'])}"
    return InvalidRequest(f"Invalid '{param}': {reason}{given}.", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path[:MAX_PATH]


def _plain(limit: Any) -> Any:
    """A limit as one writes it in JSON by hand."""
    if isinstance(limit, float) and limit.is_integer():
        return int(limit)
    return "false" if limit == "False" else limit


def _show(value: Any) -> str:
    """A short picture of a bad value; a number of a million digits is not written out."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**_MAX_SHOWN:
        return "an integer of more than 80 digits"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value[: _MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
