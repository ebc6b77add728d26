"""Grammars: which texts they let pass, which grammars are refused, and what a client reads then."""

from __future__ import annotations

from typing import Any

import llguidance
import pytest

from server.demo import MODEL
from server.errors import InvalidRequest, UnsupportedParameter
from server.grammar import (
    LIMITS,
    MAX_CHARS,
    MAX_CHOICES,
    Grammar,
    any_object,
    from_choices,
    from_lark,
    from_notation,
    from_regex,
    from_schema,
    from_schema_text,
)
from server.grammar_cache import GrammarCache
from server.grammar_check import GrammarChecker
from server.schema_form import can_end, settled

TOKENIZER = llguidance.LLTokenizer(str(MODEL / "tokenizer.json"))
CHECKER = GrammarChecker(["<|user|>", "<tool_call>"])


def passes(grammar: Grammar, text: str) -> bool:
    """Whether the real tokenizer's tokens of `text` are a whole answer of a grammar that was found good."""
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(TOKENIZER, CHECKER.check(grammar), log_level=0, limits=limits)
    return matcher.consume_tokens(TOKENIZER.tokenize_str(text)) and matcher.is_accepting()


def refusal(grammar: Grammar) -> str:
    with pytest.raises(InvalidRequest) as caught:
        CHECKER.check(grammar)
    assert caught.value.param == grammar.param
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400
    return caught.value.message


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (from_schema(PERSON, "s"), '{"name": "Ada", "age": 36}', '{"age": 36, "name": "Ada"}'),
        (from_schema(PERSON, "s"), '{"name": "Ada"}', '{"name":"Ada"}'),
        (from_schema(PERSON, "s"), '{"name": "Äda 😀"}', '{"name": "Ada"} '),
        (from_schema(True, "s"), "[1, null]", "[1,null]"),
        (from_schema({}, "s"), '"x"', "x"),
        (from_schema_text('{"type": "integer", "minimum": 3}', "s"), "7", "2"),
        (from_schema({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "s"), "0.25", "0"),
        (from_schema({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "s"), "-0.25", "-0"),
        (from_schema({"type": "array", "items": {"const": 1}, "uniqueItems": False}, "s"), "[1, 1]", "[1, 2]"),
        (from_schema({"enum": [{"exclusiveMinimum": 0}]}, "s"), '{"exclusiveMinimum": 0}', '{"minimum": 0}'),
        (any_object("r"), '{"a": [1, {"b": null}]}', "[1]"),
        (any_object("r"), "{}", "{ }"),
        (from_regex("a/b+", "r"), "a/bb", "a/"),
        (from_regex("^[0-9]{2}$", "r"), "42", "421"),
        (from_regex(r"a\/b", "r"), "a/b", "ab"),
        (from_regex("a\nb|[/]", "r"), "a\nb", "a"),
        (from_choices(["yes", "no", "no way"], "c"), "no way", "now"),
        (from_choices(['a"b', "\\", "😀\n", "<|user|>", "/x/"], "c"), 'a"b', "a"),
        (from_choices(['a"b', "\\", "😀\n", "<|user|>", "/x/"], "c"), "😀\n", "😀"),
        (from_notation('start: "a" b*\nb: /[0-9]/ "," // <no>', "g"), "a1,2,", "a1"),
        (from_notation('start: %json {"type": "integer"}', "g"), "12", "x"),
        (from_notation('root ::= "a" digits-of\ndigits-of ::= [0-9]+ | "none"', "g"), "a12", "a"),
        (from_notation('root ::= item ("," item)*\nitem ::= [^,<]+', "g"), "x,yz", ",x"),
    ],
)
def test_what_passes(grammar: Grammar, good: str, bad: str) -> None:
    assert passes(grammar, good)
    assert not passes(grammar, bad)


SMALL = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}
FREE = {"type": "array", "items": {"const": 1}, "uniqueItems": False}
KEYWORDS = ("const", "enum", "default", "example", "examples", "uniqueItems", "exclusiveMinimum", "$ref", "properties")


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_property_may_have_the_name_of_a_keyword(name: str) -> None:
    for schema, good, bad in ((SMALL, "0.25", "0"), (FREE, "[1, 1]", "[2]")):
        grammar = from_schema({"type": "object", "properties": {name: schema}, "required": [name]}, "s")
        assert passes(grammar, f'{{"{name}": {good}}}')
        assert not passes(grammar, f'{{"{name}": {bad}}}')


@pytest.mark.parametrize(
    ("schema", "beside"),
    [
        ({"$ref": "#/$defs/default"}, {"$defs": {"default": SMALL}}),
        ({"$ref": "#/definitions/enum"}, {"definitions": {"enum": SMALL}}),
        ({"$ref": "#/components/schemas/const"}, {"components": {"schemas": {"const": SMALL}}}),
        ({"$ref": "#/of%20others/~1"}, {"of others": {"/": SMALL}}),
        ({"$ref": "https://example.com/s#/x"}, {"$id": "https://example.com/s", "x": SMALL}),
        ({"anyOf": [{"allOf": [SMALL]}]}, {}),
    ],
)
def test_schemas_are_settled_wherever_they_stand(schema: dict[str, Any], beside: dict[str, Any]) -> None:
    grammar = from_schema({"type": "array", "prefixItems": [schema], "items": False, **beside}, "s")
    assert passes(grammar, "[0.25]")
    assert not passes(grammar, "[0]")


def test_what_is_no_schema_stays_as_it_is() -> None:
    for schema in (
        {"properties": {"uniqueItems": False}},
        {"enum": [SMALL, FREE]},
        {"const": {"properties": {"a": FREE}}, "default": FREE},
        {"type": "number", "exclusiveMinimum": 0, "minimum": "a"},
        {"properties": [], "items": "x", "$ref": 1, "anyOf": {"a": 1}},
    ):
        assert settled(schema) == schema
    schema = {"$ref": "#", "items": FREE}
    assert settled(schema) == {"$ref": "#", "items": {"type": "array", "items": {"const": 1}}}
    assert schema["items"] is FREE
    assert "uniqueItems" in FREE


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum (5) is greater than maximum (4)"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"if": {}, "then": {}}}}, "then"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "intger"}, "intger"),
        ({"type": "string", "format": "uri-template"}, "uri-template"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "recursive without an end"),
        (
            {"type": "object", "properties": {"n": {"type": "integer"}, "a": {"$ref": "#"}}, "required": ["a", "n"]},
            "recursive without an end",
        ),
    ],
)
def test_schemas_that_cannot_be_enforced_say_why(schema: Any, words: str) -> None:
    assert words in refusal(from_schema(schema, "guided_json"))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (from_regex("(?=a)b", "r"), "look-ahead"),
        (from_regex(r"(a)\1", "r"), "backreferences"),
        (from_regex("(", "r"), "unclosed group"),
        (from_regex("a\\", "r"), "lexer error"),
        (from_regex(r"[^\x00-\U0010ffff]", "r"), "no text satisfies it"),
        (from_notation("start: foo", "g"), "foo"),
        (from_notation("hello", "g"), "line 1"),
        (from_notation('{"grammars": [{"lark_grammar": "start: /a/"}]}', "g"), "line 1"),
        (from_notation('start: "a" start', "g"), "never end"),
        (from_notation('start: "a" <|user|>', "g"), "special token"),
        (from_notation('start: "a" <[5]>', "g"), "special token"),
        (from_notation("start: x\nx[max_tokens=3]: /a+/", "g"), "max_tokens"),
        (from_notation("start: x\nx[lazy, temperature=0.5]: /a+/", "g"), "temperature"),
        (from_notation('start ::= "a"', "g"), "root"),
        (from_notation('root ::= "a" missing', "g"), "missing"),
        (from_notation("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "g"), "nested too deeply"),
        (from_notation("root ::= [a\\", "g"), "GBNF"),
    ],
)
def test_grammars_that_cannot_be_compiled_say_why(grammar: Grammar, words: str) -> None:
    assert words in refusal(grammar)


def test_our_own_grammars_may_name_special_tokens() -> None:
    assert "<tool_call>" in CHECKER.check(from_lark('start: "x" | <tool_call> "y"', "tools"))
    assert "cannot be compiled" in refusal(from_lark("start: <no_such_token>", "tools"))


def test_what_is_refused_before_it_is_compiled() -> None:
    with pytest.raises(UnsupportedParameter, match="x-guidance"):
        from_schema({"x-guidance": {"lenient": True}}, "s")
    for text in ("{", "[1]", "NaN", '{"const": NaN}', "[" * 100_000, '{"items":' * 20_000, "1" * 5000):
        with pytest.raises(InvalidRequest, match="'s'"):
            from_schema_text(text, "s")
    for make, value in (
        (from_schema, {"const": "x" * MAX_CHARS}),
        (from_schema_text, " " * (MAX_CHARS + 1)),
        (from_regex, "a" * (MAX_CHARS + 1)),
        (from_notation, "a" * (MAX_CHARS + 1)),
        (from_choices, ["a" * MAX_CHARS, "b"]),
    ):
        with pytest.raises(InvalidRequest, match=f"at most {MAX_CHARS} characters"):
            make(value, "s")  # type: ignore[arg-type]
    for choices in ([], ["a"] * (MAX_CHOICES + 1), ["a", ""]):
        with pytest.raises(InvalidRequest, match="'c'"):
            from_choices(choices, "c")


def test_whether_values_end() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]}
    assert not can_end({"$ref": "#/$defs/n", "$defs": {"n": node}})
    assert can_end({"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [node, {"type": "null"}]}}})
    assert can_end({"$ref": "#/$defs/n", "$defs": {"n": {**node, "required": []}}})
    assert not can_end({"type": "array", "items": {"$ref": "#"}, "minItems": 1})
    assert can_end({"type": "array", "items": {"$ref": "#"}})
    assert not can_end({"type": "array", "prefixItems": [True, {"$ref": "#"}], "minItems": 2})
    chain = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(300)}
    assert can_end({"$ref": "#/$defs/d0", "$defs": {**chain, "d300": True}})
    assert not can_end({"$ref": "#/$defs/d0", "$defs": {**chain, "d300": {"$ref": "#/$defs/d7"}}})


def test_the_cache_forgets_what_was_asked_for_longest_ago() -> None:
    cache = GrammarCache(max_entries=2, max_chars=100)
    first, second, third = (from_regex(letter, "r") for letter in "abc")
    cache.put(first, "1")
    cache.put(second, "2")
    assert cache.get(first) == "1"
    cache.put(third, "3")
    assert (cache.get(first), cache.get(second), cache.get(third)) == ("1", None, "3")
    cache.put(third, "x" * 100)
    assert (cache.get(first), cache.get(third)) == (None, "x" * 100)
    cache.put(third, "x" * 101)
    assert cache.get(third) is None
    text = Grammar("start: /a/", "p")
    cache.put(text, "own")
    assert cache.get(Grammar("start: /a/", "p", is_foreign=True)) is None
    assert cache.get(Grammar("start: /a/", "q")) == "own"
