"""What an answer has to look like, written as a grammar of llguidance: from a JSON schema, a regex, a list of texts.

Here grammars are only written; a process that can be stopped compiles them (server.grammar_check).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from server.errors import InvalidRequest, UnsupportedParameter
from server.schema_form import settled

MAX_CHARS = 2**18
"""Of a schema, a regex, a grammar, or all choices together."""
MAX_CHOICES = 4096
MAX_DEPTH = 64
"""Objects and arrays of a schema inside one another: as many as those of a request body."""

LIMITS: Mapping[str, Any] = MappingProxyType(
    {
        "max_items_in_row": 2_000,
        "initial_lexer_fuel": 1_000_000,
        "step_lexer_fuel": 200_000,
        "step_max_items": 50_000,
        "max_lexer_states": 50_000,
        "max_grammar_size": 500_000,
    }
)
"""What a grammar may cost, as arguments of llguidance.LLParserLimits: wherever one is compiled, these hold."""

_JSON_FORM = {
    # As json.dumps writes. One form of each value is quicker to say, leaves more tokens without a choice, and no model
    # can go on with blanks for ever.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,  # what cannot be enforced is refused
}
_FORM_KEY = "x-guidance"
_UNESCAPED = re.compile(r"\\.|/|\n", re.DOTALL)


class Grammar(msgspec.Struct, frozen=True):
    """A grammar, and the field that asked for it."""

    text: str
    param: str
    is_foreign: bool = False
    """The client wrote it, in the notation of Lark or GBNF; else it is llguidance's own list of grammars, as JSON."""


def from_schema(schema: Any, param: str) -> Grammar:
    """The values that satisfy a JSON schema, written as json.dumps writes them. Raises InvalidRequest."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' must be a JSON schema, which is an object.", param=param)
    if _FORM_KEY in schema:
        raise UnsupportedParameter(f"'{param}.{_FORM_KEY}' is not supported.", param=f"{param}.{_FORM_KEY}")
    text = _text(schema, param)
    check_size(len(text), param)
    if '"exclusiveM' in text or '"uniqueItems"' in text:  # most schemas need no second look
        schema = settled(schema)
    return _one({"json_schema": {**schema, _FORM_KEY: _JSON_FORM}}, param)


def from_schema_text(text: str, param: str) -> Grammar:
    """The same for a schema as JSON text."""
    check_size(len(text), param)
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep(param) from None
    except ValueError as error:
        raise InvalidRequest(f"'{param}' is not valid JSON: {str(error)[:200]}.", param=param) from None
    _check_depth(schema, param)
    return from_schema(schema, param)


def any_object(param: str) -> Grammar:
    """Any JSON object."""
    return from_schema({"type": "object"}, param)


def from_regex(regex: str, param: str) -> Grammar:
    """The texts that a regular expression matches as a whole."""
    check_size(len(regex), param)
    return _one({"lark_grammar": f"start: /{_UNESCAPED.sub(_escape, regex)}/"}, param)


def from_choices(choices: Sequence[str], param: str) -> Grammar:
    """One of these texts."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"'{param}' must hold 1 to {MAX_CHOICES} texts, got {len(choices)}.", param=param)
    if not all(choices):
        raise InvalidRequest(f"'{param}' holds an empty text.", param=param)
    check_size(sum(map(len, choices)), param)
    return _one({"lark_grammar": "start: " + " | ".join(map(json.dumps, choices))}, param)


def from_notation(text: str, param: str) -> Grammar:
    """A grammar that a client wrote, in the notation of Lark or GBNF."""
    check_size(len(text), param)
    return Grammar(text, param, is_foreign=True)


def from_lark(text: str, param: str) -> Grammar:
    """A grammar that the server wrote in the notation of Lark; it may name special tokens."""
    return _one({"lark_grammar": text}, param)


def check_size(num_chars: int, param: str) -> None:
    """Raise InvalidRequest for what is too long to be compiled in time."""
    if num_chars > MAX_CHARS:
        raise InvalidRequest(f"'{param}' must have at most {MAX_CHARS} characters, got {num_chars}.", param=param)


def _check_depth(schema: Any, param: str) -> None:
    """Raise InvalidRequest for more than MAX_DEPTH levels. A schema that came as an object was a part of a body."""
    level = [schema]
    for _ in range(MAX_DEPTH + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    raise _too_deep(param)


def _too_deep(param: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' is nested too deeply: at most {MAX_DEPTH} levels.", param=param)


def _one(grammar: dict[str, Any], param: str) -> Grammar:
    return Grammar(_text({"grammars": [grammar]}, param), param)


def _text(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            f"'{param}' holds a number that is not finite, or is nested too deeply.", param=param
        ) from None


def _escape(found: re.Match[str]) -> str:
    """A slash would end the regex, and so would a line break."""
    text = found.group()
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(text, text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")
