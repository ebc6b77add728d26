"""Which tokens an answer may hold, from the fields that say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.api.schema import Common
from server.api.service import Service
from server.errors import InvalidRequest
from server.grammar import (
    Grammar,
    any_object,
    from_choices,
    from_notation,
    from_regex,
    from_schema,
    from_schema_text,
)
from server.messages import Constraint

Maker = Callable[[Any, str], Grammar]


async def constraint_of(wish: Common, service: Service) -> Constraint | None:
    """What a request asks its answer to satisfy; None if nothing. Raises InvalidRequest."""
    grammar = _grammar(wish)
    if grammar is None:
        return None
    return Constraint(grammar=await service.scribe.check(grammar))


def _grammar(wish: Common) -> Grammar | None:
    """The grammar that a request asks for. Raises InvalidRequest if it asks for two, or for what none allows."""
    asked = _asked(wish)
    if not asked:
        return None
    (param, value, make), *others = asked
    for other, _, _ in others:
        raise InvalidRequest(f"'{param}' and '{other}' cannot be combined; send one of them.", param=other)
    if wish.min_tokens:
        raise InvalidRequest(
            f"'min_tokens' cannot be combined with '{param}': the answer ends where its form does.", param="min_tokens"
        )
    if wish.ignore_eos:
        raise InvalidRequest(
            f"'ignore_eos' cannot be combined with '{param}': the answer ends where its form does.", param="ignore_eos"
        )
    return make(value, param)


def _asked(wish: Common) -> list[tuple[str, Any, Maker]]:
    """Every field that gives the answer a form, with its value and what makes a grammar of it."""
    found: list[tuple[str, Any, Maker]] = []
    form = wish.response_format
    if form is not None and form.type != "text":
        found.append(_formatted(wish))
    elif form is not None and form.json_schema is not None:
        param = "response_format.json_schema"
        raise InvalidRequest(f"'{param}' needs 'response_format.type': \"json_schema\".", param=param)
    options = wish.structured_outputs
    if options is not None:
        kinds: list[tuple[str, Any, Maker]] = [
            ("structured_outputs.json", options.json_, _from_json),
            ("structured_outputs.regex", options.regex, from_regex),
            ("structured_outputs.choice", options.choice, from_choices),
            ("structured_outputs.grammar", options.grammar, from_notation),
        ]
        if all(value is None for _, value, _ in kinds):
            param = "structured_outputs"
            raise InvalidRequest(f"'{param}' must hold one of json, regex, choice and grammar.", param=param)
        found += kinds
    found += [
        ("guided_json", wish.guided_json, _from_json),
        ("guided_regex", wish.guided_regex, from_regex),
        ("guided_choice", wish.guided_choice, from_choices),
        ("guided_grammar", wish.guided_grammar, from_notation),
    ]
    return [asked for asked in found if asked[1] is not None]


def _formatted(wish: Common) -> tuple[str, Any, Maker]:
    """What `response_format` asks for, which is JSON."""
    form = wish.response_format
    assert form is not None
    if form.type == "json_object":
        if form.json_schema is not None:
            param = "response_format.json_schema"
            raise InvalidRequest(f"'{param}' needs 'response_format.type': \"json_schema\".", param=param)
        return "response_format", form.type, lambda _, param: any_object(param)
    if form.json_schema is None:
        param = "response_format.json_schema"
        raise InvalidRequest(f"'{param}' is required for the type \"json_schema\".", param=param)
    return "response_format.json_schema.schema", form.json_schema.schema_, from_schema


def _from_json(schema: Any, param: str) -> Grammar:
    return from_schema_text(schema, param) if isinstance(schema, str) else from_schema(schema, param)
