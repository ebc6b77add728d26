"""Grammars made to do harm: each is answered 400 soon, with its limit, and the server goes on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from tests.api.house import House, make_house

SOON_S = 10.0
"""A second on a quiet machine; what hangs takes longer than this on any."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    # Four times the usual: what is refused for its form shall be so on a busy machine too.
    return make_house(tmp_path_factory.mktemp("model"), grammar_timeout_s=2.0)


def chain(length: int, end: Any, **more: Any) -> dict[str, Any]:
    """References that lead on to one another."""
    steps = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}", **more} for index in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{length}": end}}


def nested_by_refs(length: int) -> dict[str, Any]:
    """Objects in objects, which no look at the brackets tells."""
    steps = {
        f"d{index}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{index + 1}"}}}
        for index in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{length}": {"type": "null"}}}


def patterns(*texts: str) -> dict[str, Any]:
    return {"allOf": [{"type": "string", "pattern": text} for text in texts]}


def deep_text(depth: int) -> str:
    """Arrays in arrays; each asks for a second look at it."""
    return '{"uniqueItems":false,"type":"array","items":' * depth + "{}" + "}" * depth


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "deep refs": ({"guided_json": chain(5000, {"type": "null"})}, "nests too deeply"),
    "deep objects": ({"guided_json": nested_by_refs(3000)}, "nests too deeply"),
    "refs in a circle": ({"guided_json": chain(50, {"$ref": "#/$defs/d7"})}, "no text satisfies it"),
    "an endless object": (
        {"guided_json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        "recursive without an end",
    ),
    "allOf of hundreds": (
        {"guided_json": {"allOf": [{"type": "object", "properties": {f"p{n}": {}}} for n in range(500)]}},
        "limit of the compiler",
    ),
    "allOf of patterns": ({"guided_json": patterns(*(f"a.*b{'c' * n}" for n in range(400)))}, "longer than 2 s"),
    "allOf of repetitions": ({"guided_json": patterns(*(f"a.{{{n}}}b" for n in range(60)))}, "longer than 2 s"),
    "unions of unions": (
        {"guided_json": {"allOf": [{"anyOf": [{"properties": {f"{x}{n}": {}}} for x in "pq"]} for n in range(16)]}},
        "limit of the compiler",
    ),
    "thousands of properties": (
        {"guided_json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(9000)}}},
        "",
    ),
    "two megabytes": ({"guided_json": {"enum": ["x" * 1000 + str(n) for n in range(2000)]}}, "262144 characters"),
    "two megabytes of text": ({"guided_json": '{"items":' * 250_000}, "262144 characters"),
    "deep text": ({"guided_json": '{"items":' * 25_000}, "nested too deeply: at most 64 levels"),
    "text of 900 levels": ({"guided_json": deep_text(900)}, "nested too deeply: at most 64 levels"),
    "text of 65 levels": ({"guided_json": deep_text(64)}, "nested too deeply: at most 64 levels"),
    "a text as a bound": (
        {"guided_json": {"type": "number", "exclusiveMinimum": 0, "minimum": "a"}},
        "'minimum'",
    ),
    "null as a bound": ({"guided_json": {"type": "number", "exclusiveMinimum": 0, "minimum": None}}, "'minimum'"),
    "a list as a bound": ({"guided_json": {"type": "number", "exclusiveMaximum": 0, "maximum": []}}, "'maximum'"),
    "deep grammar": ({"guided_grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000}, "too deeply nested"),
    "deep GBNF": ({"guided_grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000}, "nested too deeply"),
    "a chain of rules": (
        {"guided_grammar": "start: r0\n" + "".join(f'r{n}: "a" r{n + 1}\n' for n in range(9000)) + 'r9000: "c"\n'},
        "",
    ),
    "deep regex": ({"guided_regex": "(" * 50_000 + "a" + ")" * 50_000}, "nest"),
    "a regex and its opposite": (
        {"guided_grammar": "start: X\nX: ~/(.*a.{3000})/ & /(.*b.{3000})/ & /(.*c.{3000}d.{2000})/"},
        "",
    ),
    "a pattern and its length": (
        {"guided_json": {"type": "string", "pattern": "(?:[^a]*a){500}", "minLength": 100, "maxLength": 100_000}},
        "",
    ),
    "an endless rule": ({"guided_grammar": 'start: "a" start'}, "never end"),
    "a rule of itself": ({"guided_grammar": 'start: start "a"'}, "no text satisfies it"),
    "a dead end": ({"guided_grammar": 'start: "ab" "c" X\nX: /d/ & /e/'}, "nothing can follow"),
    "200,000 choices": ({"guided_choice": ["a"] * 200_000}, "1 to 4096"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_soon(house: House, name: str) -> None:
    fields, words = HOSTILE[name]

    async def scene() -> None:
        await house.scribe.start()
        async with house.client(timeout=30) as client:
            before = await ask(client)
            assert before.status_code == 200
            started = time.monotonic()
            answer = await ask(client, **fields)
            took_s = time.monotonic() - started
            assert answer.status_code == 400, answer.text[:300]
            error = answer.json()["error"]
            assert words in error["message"]
            assert error["param"] == next(iter(fields))
            assert len(error["message"]) < 400
            assert took_s < SOON_S
            assert (await ask(client)).status_code == 200

    asyncio.run(scene())


def test_a_text_of_as_many_levels_as_allowed_is_compiled(house: House) -> None:
    assert house.post("/v1/completions", {"model": "m", "prompt": "Hi", "guided_json": deep_text(63)}).is_success


HARMLESS = {
    "the classic": "(a+)+$",
    "a regex of many states": ".*a.{30}",
    "the same again and again": "(.*a.{30}){30}",
    "nested counts": "((((a{1,100}){1,100}){1,100}){1,100})",
    "letters of all scripts": r"(\p{L}+\P{Lu}+){200}",
    "alternatives": "|".join(f".*{n}.*{n + 1}" for n in range(300)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_catastrophic_elsewhere_is_compiled_at_once(house: House, name: str) -> None:
    async def scene() -> None:
        await house.scribe.start()
        async with house.client(timeout=30) as client:
            started = time.monotonic()
            assert (await ask(client, guided_regex=HARMLESS[name])).status_code == 200
            assert time.monotonic() - started < SOON_S

    asyncio.run(scene())


def test_others_are_served_meanwhile(house: House) -> None:
    """Hostile grammars come one after the other on one process; the other one is for prompts."""

    async def scene() -> None:
        await house.scribe.start()
        async with house.client(timeout=30) as client:
            fields = HOSTILE["allOf of repetitions"][0]
            attack = [asyncio.create_task(ask(client, **fields, seed=seed)) for seed in range(4)]
            await asyncio.sleep(0.1)
            for _ in range(5):
                started = time.monotonic()
                assert (await ask(client)).status_code == 200
                assert time.monotonic() - started < SOON_S
            assert {(await task).status_code for task in attack} == {400}

    asyncio.run(scene())


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "m", "prompt": "Hi", "max_tokens": 4, **fields}
    return await client.post("/v1/completions", json=body)
