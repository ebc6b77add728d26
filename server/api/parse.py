"""From a JSON object to a validated model, with errors that name the field and its limit."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from server.api.schema import (
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_PARTS,
    MAX_STOP_IDS,
    Common,
    Message,
    Prediction,
    Speculative,
    StreamOptions,
    TextFormat,
)
from server.errors import InvalidRequest, UnsupportedParameter

Model = TypeVar("Model", bound=Common)

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_retention": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields known elsewhere that are not honoured yet, with the values that ask for nothing (null always does)."""

_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""The same for a message: an answer of the client library can be sent back as it is."""

_MAX_ENTRIES = {
    "messages": MAX_MESSAGES,
    "stop_token_ids": MAX_STOP_IDS,
    "logit_bias": MAX_LOGIT_BIAS,
    "metadata": MAX_METADATA,
}
_OBJECTS: dict[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "speculative": Speculative,
    "response_format": TextFormat,
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

_MAX_SHOWN = 80
_MAX_PATH = 256


def parse(model: type[Model], body: dict[str, Any]) -> Model:
    """Validate `body`. Raises InvalidRequest or UnsupportedParameter for the first fault.

    Pydantic collects every fault before it tells the first one, which takes seconds for a body of a million faults.
    What can hold that many is therefore bounded here, before it sees the body.
    """
    known = model.model_fields
    _check_names(body, known.keys() | _NEUTRAL.keys(), "")
    _check_sizes(body)
    body = _without_neutral(body, {name: _NEUTRAL[name] for name in _NEUTRAL.keys() & body.keys() - known.keys()}, "")
    body = _check_formats(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from None


def _check_names(value: dict[str, Any], known: Set[str], path: str) -> None:
    """Refuse the first field of `value` that nobody knows."""
    for name in value:
        if name not in known:
            raise _unknown(f"{path}{name}"[:_MAX_PATH])


def _check_sizes(body: dict[str, Any]) -> None:
    for name, most in _MAX_ENTRIES.items():
        entries = body.get(name)
        if isinstance(entries, dict | list) and len(entries) > most:
            raise InvalidRequest(f"'{name}' may hold at most {most} entries, got {len(entries)}.", param=name)


def _check_formats(body: dict[str, Any]) -> dict[str, Any]:
    """Refuse, by the right code, what a model of strings and numbers would call a wrong value."""
    response_format = body.get("response_format")
    if isinstance(response_format, dict) and response_format.get("type") in ("json_object", "json_schema"):
        raise _unsupported("response_format")
    for name, model in _OBJECTS.items():
        if isinstance(value := body.get(name), dict):
            _check_names(value, model.model_fields.keys(), f"{name}.")
            _check_parts(value.get("content"), name)
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body
    cleaned = []
    for index, message in enumerate(messages):
        if isinstance(message, dict):
            path = f"messages[{index}]"
            if message.get("role") in ("tool", "function"):
                raise _unsupported(f"{path}.role", f"The role '{message['role']}' is not supported.")
            _check_parts(message.get("content"), path)
            found = _NEUTRAL_IN_MESSAGE.keys() & message.keys()
            message = _without_neutral(message, {name: _NEUTRAL_IN_MESSAGE[name] for name in found}, f"{path}.")
            _check_names(message, Message.model_fields.keys(), f"{path}.")
        cleaned.append(message)
    return {**body, "messages": cleaned}


def _check_parts(content: Any, path: str) -> None:
    for index, part in enumerate(content[:MAX_PARTS] if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            where = f"{path}.content[{index}]"
            raise _unsupported(where, f"'{where}' is of type '{kind[:_MAX_SHOWN]}'; this model reads text only.")


def _without_neutral(value: dict[str, Any], neutral: dict[str, tuple[Any, ...]], path: str) -> dict[str, Any]:
    """`value` less its fields that ask for nothing; any other value of such a field is refused by name."""
    if not neutral:
        return value
    for name, allowed in neutral.items():
        given = value[name]
        if given is not None and not any(type(given) is type(choice) and given == choice for choice in allowed):
            raise _unsupported(f"{path}{name}")
    return {name: given for name, given in value.items() if name not in neutral}


def _unsupported(param: str, message: str | None = None) -> UnsupportedParameter:
    return UnsupportedParameter(message or f"'{param}' is not supported yet.", param=param)


def _unknown(param: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"Unknown field '{param}'.", param=param)


def _explain(error: ValidationError) -> InvalidRequest:
    """The first fault, in one sentence."""
    first = error.errors(include_url=False, include_context=True)[0]
    param = _path(first["loc"])
    kind = first["type"]
    if kind == "extra_forbidden":
        return _unknown(param)
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
    return path[:_MAX_PATH]


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
