"""JSON schemas written by hand: what applications send, and the corners of the keywords. Each can be satisfied."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> Schema:
    """An object of these properties alone; all are required unless told otherwise."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


def array(items: Any, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
SHORT = {"type": "string", "maxLength": 12}
BOOLEAN, NULL = {"type": "boolean"}, {"type": "null"}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
_EXPRESSION = {
    "anyOf": [
        DIGIT,
        closed(
            {
                "op": {"enum": ["+", "*"]},
                "left": {"$ref": "#/$defs/expression"},
                "right": {"$ref": "#/$defs/expression"},
            }
        ),
    ]
}

APPLICATIONS: dict[str, Schema] = {
    "booking": closed({"guests": {"type": "integer", "minimum": 1, "maximum": 20}, "name": SHORT}),
    "person": closed({"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 130}}, ["name"]),
    "sentiment": closed(
        {
            "label": {"enum": ["positive", "negative", "neutral"]},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        }
    ),
    "entities": closed(
        {"entities": array(closed({"text": SHORT, "kind": {"enum": ["PER", "LOC", "ORG"]}}), maxItems=3)}
    ),
    "steps": closed(
        {"steps": array(closed({"explanation": SHORT, "output": SHORT}), minItems=1, maxItems=3), "final_answer": SHORT}
    ),
    "weather call": closed(
        {"name": {"const": "get_weather"}, "arguments": closed({"city": SHORT, "unit": {"enum": ["C", "F"]}})}
    ),
    "two calls": {
        "anyOf": [
            closed({"name": {"const": "add"}, "arguments": closed({"a": DIGIT, "b": DIGIT})}),
            closed({"name": {"const": "say"}, "arguments": closed({"text": SHORT})}),
        ]
    },
    "tagged shapes": {
        "oneOf": [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Square"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            "Circle": closed(
                {"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0, "maximum": 100}}
            ),
            "Square": closed({"kind": {"const": "square"}, "side": {"type": "integer", "minimum": 1, "maximum": 50}}),
        },
    },
    "optional of pydantic": closed(
        {
            "note": {"anyOf": [SHORT, NULL], "default": None, "title": "Note"},
            "n": {"type": "integer", "title": "N", "minimum": 0, "maximum": 999},
        },
        ["n"],
        title="M",
    ),
    "invoice": closed(
        {
            "id": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "date": {"type": "string", "format": "date"},
            "lines": array(
                closed(
                    {
                        "sku": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}$"},
                        "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    }
                ),
                minItems=1,
                maxItems=3,
            ),
            "paid": BOOLEAN,
        }
    ),
    "contact": closed(
        {
            "email": {"type": "string", "format": "email", "maxLength": 24},
            "phone": {"type": "string", "pattern": r"^\+[0-9]{2} [0-9]{6,8}$"},
        }
    ),
    "log line": closed(
        {
            "at": {"type": "string", "format": "date-time"},
            "level": {"enum": ["debug", "info", "warning"]},
            "message": SHORT,
        }
    ),
    "host": closed(
        {
            "ip": {"type": "string", "format": "ipv4"},
            "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            "id": {"type": "string", "format": "uuid"},
        }
    ),
    "point": closed(
        {
            "type": {"const": "Point"},
            "coordinates": {
                "type": "array",
                "prefixItems": [
                    {"type": "number", "minimum": -180, "maximum": 180},
                    {"type": "number", "minimum": -90, "maximum": 90},
                ],
                "minItems": 2,
                "maxItems": 2,
                "items": False,
            },
        }
    ),
    "chess move": closed({"move": {"type": "string", "pattern": "^[a-h][1-8][a-h][1-8][qrbn]?$"}}),
    "todo": closed(
        {
            "todo": array(
                closed({"title": SHORT, "done": BOOLEAN, "due": {"type": ["string", "null"], "maxLength": 10}}),
                maxItems=3,
            )
        }
    ),
    "quiz": closed(
        {
            "question": SHORT,
            "options": {"type": "array", "items": SHORT, "minItems": 4, "maxItems": 4},
            "correct": {"type": "integer", "minimum": 0, "maximum": 3},
        }
    ),
    "color": closed(
        {
            "hex": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
            "alpha": {"type": "number", "minimum": 0, "maximum": 1},
        }
    ),
}

RECURSIVE: dict[str, Schema] = {
    "list": {
        "$ref": "#/$defs/node",
        "$defs": {"node": closed({"value": DIGIT, "next": {"anyOf": [NULL, {"$ref": "#/$defs/node"}]}})},
    },
    "tree": {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": closed({"label": SHORT, "children": array({"$ref": "#/$defs/tree"}, maxItems=2)})},
    },
    "itself": closed({"name": SHORT, "child": {"$ref": "#"}}, ["name"]),
    "expression": {"$ref": "#/$defs/expression", "$defs": {"expression": _EXPRESSION}},
    "mutual": {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": closed({"b": {"$ref": "#/$defs/b"}}, []),
            "b": closed({"a": {"$ref": "#/$defs/a"}, "n": DIGIT}, ["n"]),
        },
    },
    "nested arrays": {
        "$ref": "#/$defs/x",
        "$defs": {"x": {"anyOf": [DIGIT, array({"$ref": "#/$defs/x"}, maxItems=3)]}},
    },
    "interface": {
        "$ref": "#/$defs/ui",
        "$defs": {
            "ui": closed(
                {
                    "type": {"enum": ["div", "button", "field"]},
                    "label": SHORT,
                    "children": array({"$ref": "#/$defs/ui"}, maxItems=2),
                }
            )
        },
    },
    "any json": {},
    "any object": {"type": "object"},
    "any array": {"type": "array"},
    "definitions": {
        "$ref": "#/definitions/a",
        "definitions": {"a": array({"$ref": "#/definitions/b"}, maxItems=3), "b": closed({"x": DIGIT})},
    },
    "anchor": {"$ref": "#here", "$defs": {"a": {"$anchor": "here", **closed({"x": BOOLEAN})}}},
    "chain of refs": {
        "$ref": "#/$defs/d0",
        "$defs": {**{f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(20)}, "d20": DIGIT},
    },
    "escaped pointer": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"enum": ["slash"]}}},
}

CORNERS: dict[str, Schema] = {
    "null": NULL,
    "true": {"const": True},
    "const number": {"const": 12},
    "const negative": {"const": -0.5},
    "const object": {"const": {"a": [1, None, "x"], "b": {"c": False}}},
    "const unicode": {"const": "Grüße, 世界 😀"},
    "const escapes": {"const": 'quote " backslash \\ slash / tab \t line \n bell \x07'},
    "const empty": {"enum": ["", [], {}]},
    "enum of everything": {"enum": [None, True, 0, -3, 2.5, "text", ["a", 1], {"k": "v"}]},
    "enum of prefixes": {"enum": ["a", "aa", "aaa", "ab", "aba"]},
    "enum of a hundred": {"enum": [f"value {number}" for number in range(100)]},
    "enum and type": {"enum": ["yes", "no", 1], "type": "string"},
    "all types": {"type": ["null", "boolean", "integer", "string"], "maxLength": 5, "minimum": 0, "maximum": 99},
    "closed interval": {"type": "integer", "minimum": -7, "maximum": 123},
    "one integer": {"type": "integer", "minimum": 42, "maximum": 42},
    "open interval": {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 1001},
    "negative numbers": {"type": "number", "minimum": -2.5, "maximum": -0.25},
    "small numbers": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.01},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 500},
    "two multiples": {"allOf": [{"type": "integer", "multipleOf": 4}, {"multipleOf": 6, "minimum": 0, "maximum": 240}]},
    "unbounded above": {"type": "integer", "minimum": 1000},
    "empty text": {"type": "string", "maxLength": 0},
    "exact length": {"type": "string", "minLength": 5, "maxLength": 5},
    "pattern and length": {"type": "string", "pattern": "^(ab|c)+$", "minLength": 4, "maxLength": 7},
    "two patterns": {"allOf": [{"type": "string", "pattern": "^[a-m]+$"}, {"pattern": "^[h-z]{1,6}$"}]},
    "pattern without anchors": {"type": "string", "pattern": "[0-9]{3}", "maxLength": 8},
    "pattern of classes": {"type": "string", "pattern": r"^\d{2}\w{1,3}\s?-$"},
    "pattern with unicode": {"type": "string", "pattern": "^[äöüß]{1,5}€$"},
    "pattern with a quote": {"type": "string", "pattern": '^"[a-z]{1,4}"$'},
    "pattern with alternatives": {"type": "string", "pattern": "^(cat|dog|bird)( and (cat|dog|bird)){0,2}$"},
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in ("date", "time", "date-time", "duration", "ipv4", "uuid")
    },
    **{
        f"format {name}": {"type": "string", "format": name, "maxLength": 30}
        for name in ("email", "hostname", "ipv6", "uri")
    },
    "empty array": array(STRING, maxItems=0),
    "exact array": array(DIGIT, minItems=3, maxItems=3),
    "array of arrays": array(array(DIGIT, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "tuple": {"type": "array", "prefixItems": [DIGIT, SHORT, BOOLEAN], "minItems": 3, "items": False},
    "tuple and more": {"type": "array", "prefixItems": [SHORT], "items": DIGIT, "minItems": 2, "maxItems": 4},
    "short tuple": {"type": "array", "prefixItems": [DIGIT, DIGIT, DIGIT], "minItems": 1, "maxItems": 2},
    "empty object": closed({}),
    "all optional": closed({"a": DIGIT, "b": DIGIT, "c": DIGIT, "d": DIGIT}, []),
    "last one required": closed({"a": DIGIT, "b": DIGIT, "c": DIGIT}, ["c"]),
    "required but not listed": {
        "type": "object",
        "required": ["x", "y"],
        "additionalProperties": DIGIT,
        "maxProperties": 2,
    },
    "map": {"type": "object", "additionalProperties": DIGIT, "maxProperties": 3},
    "listed and more": {
        "type": "object",
        "properties": {"id": DIGIT},
        "required": ["id"],
        "additionalProperties": SHORT,
        "maxProperties": 3,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n[0-9]{1,2}$": DIGIT, "^s[0-9]{1,2}$": SHORT},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "unicode names": closed({"größe": DIGIT, "名前": SHORT, "😀": BOOLEAN, "naïve café": NULL}),
    "names to escape": closed({'a"b': DIGIT, "c\\d": DIGIT, "e/f": DIGIT, "g\th": DIGIT, "": DIGIT}),
    "names like keywords": closed(
        {"type": SHORT, "properties": DIGIT, "$ref": BOOLEAN, "enum": NULL, "required": DIGIT}
    ),
    "merged objects": {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {
                "type": "object",
                "properties": {"a": {"minimum": 5}, "b": SHORT},
                "required": ["b"],
                "additionalProperties": False,
            },
        ]
    },
    "ref with siblings": {"$ref": "#/$defs/n", "maximum": 20, "$defs": {"n": {"type": "integer", "minimum": 10}}},
    "anyOf with siblings": {
        "type": "object",
        "properties": {"k": DIGIT},
        "required": ["k"],
        "anyOf": [closed({"k": True, "a": DIGIT}), closed({"k": True, "b": DIGIT})],
    },
    "anyOf with a dead branch": {"anyOf": [{"type": "integer", "minimum": 2, "maximum": 1}, BOOLEAN]},
    "oneOf of types": {"oneOf": [DIGIT, SHORT, NULL, array(DIGIT, maxItems=2)]},
    "property that is never there": closed({"a": DIGIT, "never": False}, ["a"]),
    "deep": closed(
        {"a": closed({"b": closed({"c": closed({"d": closed({"e": closed({"f": closed({"g": DIGIT})})})})})})}
    ),
    "wide": closed({f"property_{number}": DIGIT for number in range(30)}, []),
    "long texts between": closed({f"a_rather_long_name_of_a_property_{number}": BOOLEAN for number in range(8)}),
    "remarks": {
        **closed({"a": {**DIGIT, "title": "A", "examples": [1], "deprecated": True}}),
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/s",
        "$comment": "c",
        "description": "d",
        "x-mine": 1,
    },
}

HARD_SCHEMAS: dict[str, Schema] = {**APPLICATIONS, **RECURSIVE, **CORNERS}
