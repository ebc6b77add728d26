"""Calls out of an answer's text: the same whole, letter by letter and cut anywhere, and no letter is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest

from server.tools.answer import AnswerReader, Reading
from server.tools.events import Argued, CallBegun, Event, Said, Thought
from server.tools.families import FAMILIES, MARKS, family_of

NAMES = frozenset({"get_weather", "search", "function"})
PARIS = '{"city": "Paris", "days": 3}'
LONG = json.dumps(
    {"text": 'a "quoted" {brace} </tool_call> [TOOL_CALLS] é 😀\n\\', "list": [1, -2.5e3, [], {}, None, True]}
)

Found = tuple[str, str, list[tuple[str, str]]]
"""Thinking, content, calls."""


def read(reading: Reading, pieces: Iterable[str]) -> Found:
    reader = AnswerReader(reading)
    events: list[Event] = []
    for piece in pieces:
        events += reader.feed(piece)
    events += reader.finish()
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegun):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, Argued):
            assert event.index == len(calls) - 1, "arguments of a call come before the next one"
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert reader.num_calls == len(calls)
    thought = "".join(event.text for event in events if isinstance(event, Thought))
    return thought, "".join(event.text for event in events if isinstance(event, Said)), calls


def every_cut(text: str) -> Iterable[list[str]]:
    yield [*text]
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]
    draw = random.Random(len(text))
    for _ in range(30):
        places = sorted(draw.randrange(len(text) + 1) for _ in range(4))
        yield [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def check(reading: Reading, text: str, expected: Found) -> None:
    assert read(reading, [text]) == expected
    for pieces in every_cut(text):
        assert read(reading, pieces) == expected, pieces


ONE = [("get_weather", PARIS)]
TWO = [*ONE, ("search", LONG)]
BEGIN, CALL, SEP, END, DONE = MARKS["deepseek"]


@pytest.mark.parametrize(
    ("family", "text", "content", "calls"),
    [
        ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', "", ONE),
        (
            "hermes",
            f'I will look.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
            f'<tool_call>\n{{"name": "search", "arguments": {LONG}}}\n</tool_call>',
            "I will look.",
            TWO,
        ),
        ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call> Done. ', "Done. ", ONE),
        ("hermes", f'<tool_call>{{"name":"get_weather","arguments":{PARIS}}}', "", ONE),
        ("hermes", '<tool_call>{"name": "search"}</tool_call>', "", [("search", "{}")]),
        ("hermes", f'<tool_call>{{"name": "search", "arguments": {LONG}}}\n{{"name": "search"}}</tool_call>', "",
         [("search", LONG), ("search", "{}")]),
        ("hermes", f'```json\n{{\n  "name": "get_weather",\n  "arguments": {PARIS}\n}}\n```', "", ONE),
        ("hermes", f'\n{{"name": "get_weather", "arguments": {PARIS}}}\n'
         f'{{"name": "search", "arguments": {LONG}}} Done.', "Done.", TWO),
        ("hermes", f'```json\n{{"name": "get_weather", "arguments": {PARIS}}}\n```\nand <tool_call>'
         f'{{"name": "search", "arguments": {LONG}}}</tool_call>', "and", TWO),
        ("llama3", f'{{"name": "get_weather", "parameters": {PARIS}}}', "", ONE),
        ("llama3", f'\n\n{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}', "", ONE),
        ("llama3", f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}; '
         f'{{"name": "search", "parameters": {LONG}}}', "", TWO),
        ("llama3", f'Let me see. <|python_tag|>{{"name": "get_weather", "arguments": {PARIS}}}', "Let me see.", ONE),
        ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, '
         f'{{"name": "search", "arguments": {LONG}, "id": "9Ae3bDc2F"}}]', "", TWO),
        ("mistral", f"Sure.[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]search[CALL_ID]abc123DEF[ARGS]{LONG}",
         "Sure.", TWO),
        ("mistral", f"[TOOL_CALLS]get_weather{PARIS}", "", ONE),
        ("deepseek", f"{BEGIN}{CALL}function{SEP}get_weather\n```json\n{PARIS}\n```{END}\n"
         f"{CALL}function{SEP}search\n```json\n{LONG}\n```{END}{DONE}", "", TWO),
        ("deepseek", f"Looking.\n{BEGIN}{CALL}get_weather{SEP}{PARIS}{END}{CALL}search{SEP}{LONG}{END}{DONE}",
         "Looking.", TWO),
        ("deepseek", f"{CALL}function{SEP}{PARIS}{END}", "", [("function", PARIS)]),
    ],
)  # fmt: skip
def test_calls(family: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    check(Reading(family, NAMES), text, ("", content, calls))


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize(
    "text",
    [
        "Hello.  \n",
        " \n ",
        "",
        "a < b, <tool_cal [TOOL <| " + BEGIN[:6],
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": 5}</tool_call> and more',
        '<tool_call>{"name": "search", "argu',
        "<tool_call>\n\n",
        '<tool_call> is how I call; <tool_call>{"x": 1}</tool_call>',
        '{"name": "search"}',
        '```json\n{"name": "search"}\n```',
        '```json\n{"name": "Ada", "arguments": {}}\n```',
        "```python\nprint(1)\n```",
        '{"name": "Ada", "parameters": {}}',
        '{"answer": [1, 2, {"name": "search"}]}',
        '<|python_tag|>print("x")',
        "[TOOL_CALLS] none",
        '[TOOL_CALLS] [{"name": "search", "arguments": "text"}]',
        "[TOOL_CALLS]nobody[ARGS]{}",
        f"{BEGIN}{CALL}function{SEP}nobody\n```json\n{{}}\n```{END}{DONE}",
        f"{BEGIN} {CALL}search{SEP}[1]",
        '<tool_call>{"arguments": {"a": 01}, "name": "search"}',
        '<tool_call>{"arguments": {"a": "\\x"}, "name": "search"}',
        '<tool_call>{"arguments": {"a": "line\nbreak"}, "name": "search"}',
        '<tool_call>{"arguments": {"a" 1}, "name": "search"}',
        '<tool_call>{"arguments": {"a": [1,]}, "name": "search"}',
        '<tool_call>{"arguments": {"a": nul}, "name": "search"}',
        '<tool_call>{"arguments": {"a": "\\u12g4"}, "name": "search"}',
        '<tool_call>{"arguments": ' + "[" * 1000,
    ],
)
def test_what_is_no_call_is_content(family: str, text: str) -> None:
    check(Reading(family, NAMES), text, ("", text, []))


@pytest.mark.parametrize(
    ("family", "text", "content", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "search", "arguments": {"a": 1, b: 2}}</tool_call>', "b: 2}}</tool_call>",
         '{"a": 1, '),
        ("hermes", '<tool_call>{"name": "search", "arguments": {"a": "cut o', "", '{"a": "cut o'),
        ("hermes", '<tool_call>{"name": "search", "arguments": {}, oops', ", oops", "{}"),
        ("hermes", '<tool_call>{"name": "search", "arguments": {}} trailing', "trailing", "{}"),
        ("llama3", '{"name": "search", "parameters": {}} and text', "and text", "{}"),
        ("mistral", "[TOOL_CALLS]search[ARGS]{}text", "text", "{}"),
        ("mistral", '[TOOL_CALLS] [{"name": "search", "arguments": {}} nonsense', "nonsense", "{}"),
        ("deepseek", f"{BEGIN}{CALL}search{SEP}{{}}oops{END}", f"oops{END}", "{}"),
        ("hermes", '<tool_call>{"name": "search", "arguments": {"a": ' + "9" * 1200, "9" * 200,
         '{"a": ' + "9" * 1000),
    ],
)  # fmt: skip
def test_what_breaks_off_leaves_a_call_and_the_rest(family: str, text: str, content: str, arguments: str) -> None:
    check(Reading(family, NAMES), text, ("", content, [("search", arguments)]))


BOUND_ANSWERS = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "search", "arguments": {LONG}}}\n</tool_call>',
    "llama3": f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "search", "parameters": {LONG}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, '
    f'{{"name": "search", "arguments": {LONG}}}]',
    "deepseek": f"{BEGIN}{CALL}function{SEP}get_weather\n```json\n{PARIS}\n```{END}\n"
    f"{CALL}function{SEP}search\n```json\n{LONG}\n```{END}{DONE}",
}


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("thought", ["", "<think>\nLet me see.\n</think>\n\n"])
def test_a_bound_answer_that_is_cut_has_no_content(family: str, thought: str) -> None:
    """Wherever it is cut: in a mark, in the head of a call, between two calls."""
    reading = Reading(family, NAMES, is_bound=True, splits_thinking=bool(thought))
    text = thought + BOUND_ANSWERS[family]
    assert read(reading, [text])[1:] == ("", TWO)
    for end in range(len(text)):
        found = read(reading, [text[:end]])
        assert found[1] == "", text[:end]
        assert found == read(reading, [*text[:end]])
        assert [name for name, _ in found[2]] == [name for name, _ in TWO][: len(found[2])]


def test_a_bound_answer_that_is_not_what_it_should_be_is_told() -> None:
    reading = Reading("hermes", NAMES, is_bound=True)
    assert (
        read(reading, ['<tool_call>{"name": "nobody"}</tool_call>'])[1] == '<tool_call>{"name": "nobody"}</tool_call>'
    )


def test_a_call_is_told_before_it_ends_and_a_long_text_is_not_held() -> None:
    reader = AnswerReader(Reading("hermes", NAMES))
    assert reader.feed("Hello, wor") == [Said("Hello, wor")]
    assert reader.feed('ld <tool_call>{"name": "search", "argum') == [Said("ld")]
    assert reader.feed('ents": {"q": "lo') == [CallBegun(0, "search"), Argued(0, '{"q": "lo')]
    assert reader.feed("ng") == [Argued(0, "ng")]
    plain = AnswerReader(Reading("llama3", NAMES))
    assert plain.feed('{"title": "x') == [Said('{"title": "x')]


@pytest.mark.parametrize("family", [*FAMILIES])
def test_noise_is_never_lost(family: str) -> None:
    draw = random.Random(5)
    words = [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", BEGIN, CALL, SEP, END, DONE),
        *("{", "}", '"name"', '"search"', '"arguments"', ":", ",", "[", "]", " ", "\n", "search", "function", "12"),
        *('"', "\\"),
    ]
    for _ in range(400):
        text = "".join(draw.choices(words, k=draw.randrange(12)))
        cuts = [*text]
        whole = read(Reading(family, NAMES), [text])
        assert whole == read(Reading(family, NAMES), cuts), text
        if not whole[2]:
            assert whole[1] == text


THINK = Reading(splits_thinking=True)
OPENED = Reading("hermes", NAMES, splits_thinking=True, starts_thinking=True)
TOOL = f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}</tool_call>'


@pytest.mark.parametrize(
    ("reading", "text", "expected"),
    [
        (THINK, "<think>\nLet me\nsee.\n</think>\n\nHi!\n", ("Let me\nsee.", "Hi!\n", [])),
        (THINK, "\n<think>\n\n</think>\n\nHi!", ("", "Hi!", [])),
        (THINK, " Hi! <think>no</think>", ("", " Hi! <think>no</think>", [])),
        (THINK, "<think>cut off <", ("cut off <", "", [])),
        (THINK, "<thin", ("", "<thin", [])),
        (OPENED, "\nLet me see. \n</think>\n\nHi!", ("Let me see.", "Hi!", [])),
        (OPENED, f"Call {TOOL}? yes</think>\n{TOOL}", (f"Call {TOOL}? yes", "", ONE)),
        (OPENED, "<think>\nagain</think> x", ("again", "x", [])),
    ],
)
def test_thinking(reading: Reading, text: str, expected: Found) -> None:
    check(reading, text, expected)


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ '<tool_call>\n{\"name\": ' }}", "hermes"),
        ("<tool_call>\n<function=f>", ""),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        (f"{{{{ '{CALL}' }}}}", "deepseek"),
        ("<|start_header_id|> {\"name\": , \"parameters\": }", "llama3"),
        ("<|python_tag|>", "llama3"),
        ("{{ messages }}", ""),
    ],
)  # fmt: skip
def test_the_family_is_seen_in_the_template(template: str, family: str) -> None:
    assert family_of(template) == family
