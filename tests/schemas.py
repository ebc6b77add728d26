"""300 JSON schemas of growing hardness over the keywords that are enforced: some by hand, the others by construction.

Each can be satisfied: bounds are drawn in order, and a ref always has a way out. The same seed gives the same schemas.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.hard_schemas import HARD_SCHEMAS, Schema, array, closed

NUM_SCHEMAS = 300
MAX_LEVEL = 8
_SEED = 16

_NAMES = (
    *("id", "name", "size", "kind", "count", "isOpen", "created_at", "tags", "price-eur", "x.y", "two words", "9lives"),
    *("größe", "имя", "名前", "œuvre", "naïve", "ключ", "😀", "prix €", 'say "hi"', "back\\slash", "and/or", "$value"),
)
_WORDS = ("red", "green", "blue", "one", "two", "three", "größer", "日本", "a b", "x-y", "", "no", "yes", "maybe")
_PATTERNS = (
    *("^[a-z]{1,8}$", "^[A-Z][a-z]{2,6}$", "^[0-9]{3}-[0-9]{2}$", "^(yes|no|maybe)$", "^v[0-9]+\\.[0-9]$", "^[ab]*c$"),
    *("^[0-9a-f]{8}$", "^#[0-9A-F]{3}$", "^([a-z]+ ){0,2}[a-z]+$", "^[αβγ]{1,4}$", "^\\$[0-9]{1,4}\\.[0-9]{2}$"),
)
_FORMATS = ("date", "time", "date-time", "duration", "ipv4", "uuid")

Maker = Callable[[random.Random], Any]


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}
    if rng.random() < 0.3:
        schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 300)}
    if rng.random() < 0.2:
        step = rng.randint(2, 12)
        schema = {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": step * rng.randint(1, 50)}
    return schema


def _number(rng: random.Random) -> Schema:
    low = round(rng.uniform(-50, 50), rng.randint(0, 3))
    return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(1, 90), rng.randint(0, 2))}


def _text(rng: random.Random) -> Schema:
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 10)}


def _pattern(rng: random.Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _format(rng: random.Random) -> Schema:
    return {"type": "string", "format": rng.choice(_FORMATS)}


def _enum(rng: random.Random) -> Schema:
    values: list[Any] = rng.sample(_WORDS, rng.randint(1, 6))
    if rng.random() < 0.3:
        values += [None, True, rng.randint(-9, 99), {"k": rng.choice(_WORDS)}, [1, "x"]][: rng.randint(1, 5)]
    return {"enum": values}


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice((*_WORDS, 0, 17, -1.5, True, None, [1, [2]], {"a": {"b": "c"}}))}


def _plain(rng: random.Random) -> Schema:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))


_LEAVES: tuple[Maker, ...] = (_integer, _number, _text, _pattern, _format, _enum, _const, _plain)


class _Generator:
    """Makes one schema. Owns its random numbers and the definitions that the schema refers to."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)
        self._definitions: dict[str, Schema] = {}

    def make(self, level: int) -> Schema:
        """A schema of this level: the higher, the deeper it nests and the more keywords it combines."""
        schema = self._object(level) if level > 1 else self._value(level)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _value(self, level: int) -> Schema:
        if level <= 1 or self._rng.random() < 0.25:
            return self._leaf()
        kinds: list[Callable[[int], Schema]] = [self._object, self._array, self._tuple, self._nullable]
        if level > 2:
            kinds += [self._union, self._tagged, self._map, self._merged]
        if level > 3:
            kinds += [self._named, self._recursive]
        return self._rng.choice(kinds)(level - 1)

    def _leaf(self) -> Schema:
        return self._rng.choice(_LEAVES)(self._rng)

    def _object(self, level: int) -> Schema:
        names = self._rng.sample(_NAMES, self._rng.randint(1, min(2 + level // 2, 5)))
        required = [name for name in names if self._rng.random() < 0.7]
        return closed({name: self._value(level - 1) for name in names}, required)

    def _array(self, level: int) -> Schema:
        low = self._rng.randint(0, 2)
        return array(self._value(level - 1), minItems=low, maxItems=low + self._rng.randint(0, 2))

    def _tuple(self, level: int) -> Schema:
        items = [self._value(level - 1) for _ in range(self._rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}

    def _nullable(self, level: int) -> Schema:
        return {"anyOf": [self._value(level - 1), {"type": "null"}]}

    def _union(self, level: int) -> Schema:
        return {"anyOf": [self._value(level - 1) for _ in range(self._rng.randint(2, 3))]}

    def _tagged(self, level: int) -> Schema:
        tags = self._rng.sample(("circle", "square", "line", "größe"), 3)
        return {"oneOf": [closed({"kind": {"const": tag}, "data": self._value(level - 2)}) for tag in tags]}

    def _map(self, level: int) -> Schema:
        return {"type": "object", "additionalProperties": self._value(level - 2), "maxProperties": 2}

    def _merged(self, level: int) -> Schema:
        left, right = self._rng.sample(_NAMES, 2)
        return {
            "allOf": [
                {"type": "object", "properties": {left: self._value(level - 2)}, "required": [left]},
                {"type": "object", "properties": {right: self._leaf()}, "required": [right]},
            ],
            "properties": {left: True, right: True},
            "additionalProperties": False,
        }

    def _named(self, level: int) -> Schema:
        """A definition, referred to twice."""
        ref = self._define(self._value(level - 1))
        return closed({"first": ref, "second": ref}, ["first"])

    def _recursive(self, level: int) -> Schema:
        """A definition that refers to itself, and need not."""
        name = f"d{len(self._definitions)}"
        ref = {"$ref": f"#/$defs/{name}"}
        self._definitions[name] = {}  # taken
        again = self._rng.choice(({"anyOf": [{"type": "null"}, ref]}, array(ref, maxItems=1)))
        self._definitions[name] = closed({"value": self._value(level - 2), "next": again})
        return ref

    def _define(self, schema: Schema) -> Schema:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}


def make_schemas() -> dict[str, Schema]:
    """All of them by name, the hard ones last."""
    count = NUM_SCHEMAS - len(HARD_SCHEMAS)
    made = {}
    for index in range(count):
        level = 1 + index * MAX_LEVEL // count
        made[f"level {level}, {index}"] = _Generator(_SEED * 1000 + index).make(level)
    return {**made, **HARD_SCHEMAS}
