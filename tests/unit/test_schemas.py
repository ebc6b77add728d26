"""The 300 schemas of tests/schemas.py: each compiles, and whatever is said under one satisfies it."""

from __future__ import annotations

import json
import random

import jsonschema
import llguidance
import pytest

from server.grammar import from_schema
from server.grammar_check import GrammarChecker
from tests.schemas import NUM_SCHEMAS, make_schemas

SCHEMAS = make_schemas()
CHECKER = GrammarChecker([])
TOKENIZER = CHECKER._tokenizer
END = 256
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid", "email"])
"""Those that jsonschema checks by itself and by the same book."""


def test_there_are_as_many_as_promised_and_always_the_same() -> None:
    assert len(SCHEMAS) == NUM_SCHEMAS
    assert make_schemas() == SCHEMAS
    assert len({json.dumps(schema) for schema in SCHEMAS.values()}) > 0.97 * NUM_SCHEMAS
    told = json.dumps(list(SCHEMAS.values()))
    keywords = (
        *("type", "enum", "const", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("multipleOf", "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "required", "properties"),
        *("additionalProperties", "patternProperties", "prefixItems", "items", "anyOf", "oneOf", "allOf", "$ref"),
        *("$defs", "definitions", "$anchor"),
    )
    assert [name for name in keywords if f'"{name}":' not in told] == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_said_at_random_satisfies_the_schema(name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    text = CHECKER.check(from_schema(schema, "schema"))
    for seed in range(3):
        said = speak(text, random.Random(seed))
        value = json.loads(said)
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(value)


def speak(grammar: str, rng: random.Random) -> str:
    """A whole answer, byte by byte at random among those that the grammar lets pass, with a wish to come to an end."""
    matcher = llguidance.LLMatcher(TOKENIZER, grammar, log_level=0)
    said = bytearray()
    while True:
        assert len(said) < 10_000
        mask = matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()
        allowed = [byte for byte in range(END + 1) if mask[byte >> 3] >> (byte & 7) & 1]
        assert allowed, f"a dead end after {said!r}"
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return said.decode()
        allowed = [byte for byte in allowed if byte != END]
        ends = [byte for byte in allowed if byte in b'"]}']
        is_long = len(said) > 400
        byte = rng.choice(ends if ends and rng.random() < (0.95 if is_long else 0.3) else allowed)
        if is_long and ord("n") in allowed and said.endswith(b": "):
            byte = ord("n")  # null ends a chain
        assert matcher.consume_token(byte)
        said.append(byte)
