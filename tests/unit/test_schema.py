"""The request models: strict, closed, and truthful in /openapi.json."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.api.order import check_token_ids
from server.api.parse import parse
from server.api.schema import ChatRequest, Common, CompletionRequest
from server.api.service import SeedSource, choice_seed
from server.errors import InvalidRequest, UnsupportedParameter

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}


def test_every_field_may_be_null_but_the_needed_ones() -> None:
    for model, body in ((ChatRequest, CHAT), (CompletionRequest, COMPLETION)):
        optional = [name for name, field in model.model_fields.items() if not field.is_required()]
        parsed: Common = parse(model, {**body, **dict.fromkeys(optional)})
        assert all(getattr(parsed, name) is None for name in optional)


@pytest.mark.parametrize("name", [name for name in Common.model_fields if name != "guided_json"])  # which is a schema
def test_no_field_takes_an_object_of_strangers(name: str) -> None:
    with pytest.raises(InvalidRequest) as failure:
        parse(CompletionRequest, {**COMPLETION, name: {"strange": [object]}})
    assert failure.value.param is not None
    assert failure.value.param.startswith(name)


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_prompt_forms(prompt: Any, parsed: Any) -> None:
    assert parse(CompletionRequest, {**COMPLETION, "prompt": prompt}).prompt == parsed


def test_stop_forms() -> None:
    assert parse(ChatRequest, {**CHAT, "stop": "a"}).stop == ["a"]
    assert parse(ChatRequest, {**CHAT, "stop": ["a", "b"]}).stop == ["a", "b"]
    assert parse(ChatRequest, {**CHAT, "stop": []}).stop == []


def test_unknown_fields_are_named_with_their_path() -> None:
    with pytest.raises(UnsupportedParameter, match=r"Unknown field 'stream_options\.speed'"):
        parse(ChatRequest, {**CHAT, "stream_options": {"speed": 1}})


def test_many_fields_that_ask_for_nothing_are_passed_over_at_once() -> None:
    many = dict.fromkeys(f"k{index}" for index in range(500_000))
    started = time.monotonic()
    with pytest.raises(UnsupportedParameter, match=r"Unknown field 'speculative\.last'"):
        parse(ChatRequest, {**CHAT, **many, "deep": {"deeper": many}, "speculative": {**many, "last": 1}})
    assert time.monotonic() - started < 2.0  # 0.2 s on an idle machine


def test_values_in_messages_of_errors_are_short() -> None:
    for bad in (10**5000, "y" * 10**6, ["y" * 10**6], {"y" * 10**6: 1}):
        with pytest.raises(InvalidRequest) as failure:
            parse(ChatRequest, {**CHAT, "temperature": bad})
        assert len(failure.value.message) < 300
    with pytest.raises(InvalidRequest) as failure:
        parse(ChatRequest, {**CHAT, "k" * 10**6: 1})
    assert len(failure.value.message) < 300


def test_json_schema_tells_the_forms() -> None:
    schema = CompletionRequest.model_json_schema()
    assert schema["additionalProperties"] == {"enum": [None, "", [], {}]}
    assert schema["required"] == ["model", "prompt"]
    assert {"type": "string", "minLength": 1} in schema["properties"]["prompt"]["anyOf"]
    assert len(schema["properties"]["prompt"]["anyOf"]) == 4
    content = ChatRequest.model_json_schema()["$defs"]["Message"]["properties"]["content"]
    assert [form["type"] for form in content["anyOf"]] == ["string", "array", "null"]


def test_choice_seeds() -> None:
    assert choice_seed(5, 0) == 5
    seeds = {choice_seed(seed, choice) for seed in range(20) for choice in range(1, 20)}
    assert len(seeds) == 20 * 19
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert choice_seed(5, 1) == choice_seed(5, 1)


def test_seed_source() -> None:
    assert [SeedSource(3).draw() for _ in range(2)] == [SeedSource(3).draw()] * 2
    assert SeedSource(0).draw() != SeedSource(0).draw()


def test_token_ids() -> None:
    assert check_token_ids([0, 9], 10, "prompt") == (0, 9)
    with pytest.raises(InvalidRequest, match="10, which is not a token id: the vocabulary has 10 tokens, 0 to 9"):
        check_token_ids([10], 10, "prompt")
