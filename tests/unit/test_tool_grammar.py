"""Grammars of tool calls: what they let through is read as calls whose arguments satisfy their schemas."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from server.grammar import Grammar as Form
from server.grammar import from_choices, from_lark, from_schema
from server.tools.answer import AnswerReader, Reading
from server.tools.events import Argued, CallBegun, Said
from server.tools.families import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, FAMILIES, MARKS, SEPARATOR, Dialect
from server.tools.grammar import Calls, Thinking, Tool, after_thinking, call_grammar
from server.tools.thinking import MARKS as THINKING_MARKS
from tests.api.model_folder import END, byte_tokenizer

WEATHER = Tool(
    "get_weather",
    {
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Köln \"am\" Rhein"]}},
    },
    is_strict=True,
)  # fmt: skip
LOOSE = Tool("search", {"type": "object", "properties": {"q": {"type": "string", "maxLength": 5}}, "required": ["q"]})
DIALECTS = [Dialect(family, is_short) for family in FAMILIES for is_short in (False, True)]


@cache
def tokenizer(family: str, has_marks: bool) -> tuple[Tokenizer, LLTokenizer]:
    """A token a byte, and, or not, one for each mark, as an ordinary added token or a special one."""
    found = byte_tokenizer()
    if has_marks:
        special = [AddedToken(mark, special=True, normalized=False) for mark in MARKS[family]]
        found.add_special_tokens(special)
        found.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in THINKING_MARKS])
    return found, LLTokenizer(found.to_str(), eos_token=END)


class Grammar:
    def __init__(self, calls: Calls, has_marks: bool, thinking: Thinking = Thinking.NONE):
        self._tokenizer, self._ll = tokenizer(calls.dialect.family, has_marks)
        self._grammar = LLMatcher.grammar_from_lark(call_grammar(calls, self._tokenizer.token_to_id, thinking))
        assert not LLMatcher.validate_grammar(self._grammar, self._ll), LLMatcher.validate_grammar(
            self._grammar, self._ll
        )
        self._marks = {*MARKS[calls.dialect.family], *THINKING_MARKS} if has_marks else set()

    def takes(self, text: str) -> bool:
        matcher = LLMatcher(self._ll, self._grammar)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    def sample(self, draw: random.Random, most: int = 600) -> str:
        """A random answer that the grammar lets through, ended as soon as it may be."""
        matcher = LLMatcher(self._ll, self._grammar)
        ids: list[int] = []
        while len(ids) < most:
            bias = matcher.compute_logit_bias()
            allowed = [token for token, value in enumerate(bias) if value and token != END]
            if bias[END] and (not allowed or draw.random() < 0.5):
                break
            marks = [token for token in allowed if token > 255]
            letters = [token for token in allowed if token < 128]
            ids.append(
                draw.choice(
                    marks if marks and draw.random() < 0.6 else letters if letters and draw.random() < 0.7 else allowed
                )
            )
            matcher.consume_token(ids[-1])
        return self._text(ids)

    def _text(self, ids: list[int]) -> str:
        out = b""
        for token in ids:
            out += bytes([token]) if token < 256 else str(self._tokenizer.id_to_token(token)).encode()
        return out.decode()


def calls_in(dialect: Dialect, text: str, thinking: Thinking = Thinking.NONE) -> tuple[str, list[tuple[str, Any]]]:
    reading = Reading(
        dialect.family,
        frozenset({"get_weather", "search"}),
        splits_thinking=thinking is not Thinking.NONE,
        starts_thinking=thinking is Thinking.OPEN,
    )
    reader = AnswerReader(reading)
    said, calls = "", []
    for event in [*reader.feed(text), *reader.finish()]:
        if isinstance(event, CallBegun):
            calls.append([event.name, ""])
        elif isinstance(event, Argued):
            calls[-1][1] += event.text
        elif isinstance(event, Said):
            said += event.text
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_required_calls_satisfy_their_schemas(dialect: Dialect, is_parallel: bool, has_marks: bool) -> None:
    draw = random.Random(3)
    grammar = Grammar(Calls((WEATHER, LOOSE_CLOSED), dialect, True, is_parallel), has_marks)
    names, most = set(), 0
    for _ in range(12):
        text = grammar.sample(draw)
        said, calls = calls_in(dialect, text)
        assert said == "", text
        assert calls, text
        most = max(most, len(calls))
        for name, arguments in calls:
            names.add(name)
            jsonschema.validate(arguments, {"type": "object", **BY_NAME[name].schema})
    assert names == {"get_weather", "search"}
    assert (most > 1) == is_parallel


LOOSE_CLOSED = Tool("search", {**LOOSE.schema, "additionalProperties": False})
BY_NAME = {"get_weather": WEATHER, "search": LOOSE_CLOSED}

PARIS = '{"city": "Paris", "days": 3}'
WRONG = '{"city": "Rome", "days": 3}'


def written(dialect: Dialect, *arguments: str, name: str = "get_weather") -> str:
    match dialect.family, dialect.is_short:
        case "hermes", _:
            return "\n".join(
                f'<tool_call>\n{{"name": "{name}", "arguments": {one}}}\n</tool_call>' for one in arguments
            )
        case "llama3", _:
            return "; ".join(f'{{"name": "{name}", "parameters": {one}}}' for one in arguments)
        case "mistral", True:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{one}" for one in arguments)
        case "mistral", False:
            listed = ", ".join(f'{{"name": "{name}", "arguments": {one}}}' for one in arguments)
            return f"[TOOL_CALLS] [{listed}]"
        case _, True:
            body = [f"{name}{SEPARATOR}{one}" for one in arguments]
        case _:
            body = [f"function{SEPARATOR}{name}\n```json\n{one}\n```" for one in arguments]
    between = "" if dialect.is_short else "\n"
    listed = between.join(f"{CALL_BEGIN}{one}{CALL_END}" for one in body)
    return f"{CALLS_BEGIN}{listed}{CALLS_END}"


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_what_is_asked_for_passes_and_nothing_else(dialect: Dialect, has_marks: bool) -> None:
    required = Grammar(Calls((WEATHER,), dialect, True, False), has_marks)
    assert required.takes(written(dialect, PARIS))
    for wrong in ("", "Hello", written(dialect, WRONG), written(dialect, PARIS, PARIS), written(dialect, PARIS)[:-1]):
        assert not required.takes(wrong), wrong
    assert not required.takes(written(dialect, PARIS, name="search"))
    assert Grammar(Calls((WEATHER,), dialect, True, True), has_marks).takes(written(dialect, PARIS, PARIS))


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_free_text_may_call_and_calls_are_right(dialect: Dialect, has_marks: bool) -> None:
    mixed = Grammar(Calls((WEATHER, LOOSE), dialect, False, False), has_marks)
    for text in ("", "Hello, {world}\n< [", written(dialect, PARIS), written(dialect, '{"any": [1]}', name="search")):
        assert mixed.takes(text), text
    if dialect.family != "llama3":
        assert mixed.takes("Let me see.\n" + written(dialect, PARIS))
    for wrong in (written(dialect, WRONG), written(dialect, PARIS, PARIS), written(dialect, PARIS)[:-1]):
        assert not mixed.takes(wrong), wrong
        assert dialect.family == "llama3" or not mixed.takes("Text, then " + wrong), wrong
    many = Grammar(Calls((WEATHER, LOOSE), dialect, False, True), has_marks)
    assert many.takes(written(dialect, PARIS, PARIS))
    assert not many.takes(written(dialect, PARIS, WRONG))


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=str)
def test_thinking_comes_first(dialect: Dialect, has_marks: bool) -> None:
    call = written(dialect, PARIS)
    opened = Grammar(Calls((WEATHER,), dialect, True, False), has_marks, Thinking.OPEN)
    assert opened.takes(f"Let me see.\n</think>\n\n{call}")
    assert not opened.takes(call)
    maybe = Grammar(Calls((WEATHER,), dialect, True, False), has_marks, Thinking.MAYBE)
    assert maybe.takes(f"<think>\nhm\n</think>\n\n{call}")
    assert maybe.takes(call)
    assert not maybe.takes(f"hm</think>{call}")
    assert calls_in(dialect, f"hm</think>{call}", Thinking.OPEN) == ("", [("get_weather", json.loads(PARIS))])


@pytest.mark.parametrize("has_marks", [True, False])
@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (from_schema({"type": "object", "properties": {"a": {"type": "integer"}}}, "x"), '{"a": 1}', '{"a": "b"}'),
        (from_choices(["yes", "no"], "x"), "no", "maybe"),
        (from_lark('start: word " " word\nword: /[a-z]+/', "x"), "ab cd", "ab"),
    ],
)
def test_a_form_leaves_room_for_thinking(form: Form, right: str, wrong: str, has_marks: bool) -> None:
    found, ll = tokenizer("hermes", has_marks)
    think = "<think>\nhm, <b> {\n</think>\n\n"

    def takes(thinking: Thinking, text: str) -> bool:
        matcher = LLMatcher(ll, after_thinking(form.text, thinking, found.token_to_id))
        ids = found.encode(text, add_special_tokens=False).ids
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    assert takes(Thinking.NONE, right)
    assert takes(Thinking.OPEN, think.removeprefix("<think>") + right)
    assert takes(Thinking.MAYBE, think + right)
    assert takes(Thinking.MAYBE, right)
    for text in (wrong, think + wrong, think + think + right, think + right + " more"):
        assert not takes(Thinking.MAYBE, text), text
    assert not takes(Thinking.OPEN, right)
