"""Fields for which nothing is done: defaults that clients spell out, cache hints, answers sent back as they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.api.fields import NEUTRAL, NEUTRAL_IN_MESSAGE
from server.api.schema import ChatRequest, CompletionRequest
from server.messages import Submit
from tests.api.house import House, chat_body, make_house

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMPTY: tuple[Any, ...] = (None, "", [], {}, {"a": None}, {"a": {"b": []}, "c": ""})
ASKING: tuple[Any, ...] = (False, True, 0, 1, 0.0, "x", [None], [[]], {"a": 0}, {"a": {"b": [1]}})


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("model"))


def submitted(house: House, path: str, **fields: Any) -> Submit:
    """What the engine is asked for, but for the request's id."""
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi", "max_tokens": 100}
    response = house.post(path, {"seed": 1, **body, **fields})
    assert response.status_code == 200, response.text
    return msgspec.structs.replace(house.engine.submits[-1], id="")


def refusal(house: House, path: str, **fields: Any) -> tuple[str, str]:
    """Code and field of an error in the shape of OpenAI."""
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi"}
    before = len(house.engine.submits)
    response = house.post(path, {**body, **fields})
    assert response.status_code == 400, response.text
    assert len(house.engine.submits) == before
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] in error["message"]
    return error["code"], error["param"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", ["some_library_option", "functions", "suffix", "guided_decoding_backend"])
def test_empty_values_ask_for_nothing(house: House, path: str, name: str) -> None:
    for value in EMPTY:
        assert submitted(house, path, **{name: value}) == submitted(house, path)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_other_value_of_an_unknown_field_is_refused_by_name(house: House, path: str) -> None:
    for value in ASKING:
        assert refusal(house, path, some_library_option=value) == ("unsupported_parameter", "some_library_option")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_values_that_say_what_happens_anyway(house: House, path: str) -> None:
    plain = submitted(house, path)
    model = ChatRequest if path == CHAT else CompletionRequest
    for name, values in NEUTRAL.items():
        if name in model.model_fields:
            continue
        for value in (None, *values):
            assert submitted(house, path, **{name: value}) == plain, name
        if values and not isinstance(values[0], bool):
            assert refusal(house, path, **{name: True})[1] == name  # True is no 1


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 0},
        {"logprobs": False, "top_logprobs": 0},
        {"logprobs": None, "top_logprobs": None},
    ],
)
def test_no_alternatives_of_no_logprobs(house: House, fields: dict[str, Any]) -> None:
    assert submitted(house, CHAT, **fields) == submitted(house, CHAT)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "fields",
    [
        {"speculative": {}},
        {"speculative": {"enabled": None, "drafter": None, "max_nodes": None, "metrics": None}},
        {"speculative": {"enabled": True, "drafter": "", "metrics": False, "later": None}},
        {"stream_options": {}},
        {"stream_options": {"include_usage": None, "continuous_usage_stats": None, "include_obfuscation": None}},
        {"stream_options": {"include_usage": False, "continuous_usage_stats": False, "later": {}}},
        {"stream": False, "stream_options": None},
        {"n": 1, "best_of": 1, "stop": [], "stop_token_ids": [], "logit_bias": {}, "min_p": 0, "top_k": -1},
        {"n": None, "stop": "", "logit_bias": None, "min_p": None, "top_k": 0, "top_p": 1, "temperature": 1},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_tokens": 0, "echo": False},
        {"ignore_eos": False, "include_stop_str_in_output": False, "user": "", "metadata": {}, "store": False},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}, "prompt_cache_retention": "24h"},
    ],
)
def test_defaults_spelled_out(house: House, path: str, fields: dict[str, Any]) -> None:
    assert submitted(house, path, **fields) == submitted(house, path)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_unknown_fields_inside_objects_are_named_with_their_path(house: House, path: str) -> None:
    for name in ("speculative", "stream_options"):
        assert refusal(house, path, **{name: {"later": 1}}) == ("unsupported_parameter", f"{name}.later")


@pytest.mark.parametrize("name", ["web_search_options", "json_schema", "allowed_token_ids", "audio"])
def test_empty_values_that_do_ask(house: House, name: str) -> None:
    for value in ({}, []):
        assert refusal(house, CHAT, **{name: value})[1] == name


def test_stream_options_that_ask_need_a_stream(house: House) -> None:
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}):
        assert refusal(house, CHAT, stream_options=options) == ("invalid_value", "stream_options")


def test_usage_options_with_null(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": None}
    assert '"completion_tokens":' in house.chat(stream=True, stream_options=options).text


def test_the_best_token_alone_is_greedy(house: House) -> None:
    greedy = submitted(house, CHAT, temperature=0)
    for value in (0, 0.0):
        sampling = submitted(house, CHAT, top_p=value, temperature=1.5).sampling
        assert (sampling.temperature, sampling.top_p) == (0.0, 0.0)
    assert submitted(house, CHAT, temperature=0, top_p=1) == greedy
    assert submitted(house, CHAT, top_p=1e-9).sampling.temperature == 1.0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_both_names_of_the_limit(house: House, path: str) -> None:
    assert submitted(house, path, max_completion_tokens=7, max_tokens=None).sampling.max_tokens == 7
    assert submitted(house, path, max_completion_tokens=7, max_tokens=7).sampling.max_tokens == 7
    assert refusal(house, path, max_completion_tokens=7, max_tokens=8) == ("invalid_value", "max_tokens")
    assert refusal(house, path, max_completion_tokens=5000)[1] == "max_completion_tokens"


def test_best_of_what_is_asked_for_anyway(house: House) -> None:
    assert len(house.complete(n=2, best_of=2).json()["choices"]) == 2
    assert refusal(house, COMPLETIONS, n=2, best_of=3) == ("unsupported_parameter", "best_of")


def test_special_tokens_are_added_unless_told_not_to(tmp_path: Path) -> None:
    house = make_house(tmp_path, model={"adds_bos": True})
    asked = {value: submitted(house, COMPLETIONS, add_special_tokens=value).prompt for value in (None, True, False)}
    assert asked[None] == asked[True] == (256, *b"Hi")
    assert asked[False] == tuple(b"Hi")
    assert submitted(house, CHAT, add_special_tokens=False) == submitted(house, CHAT)
    assert refusal(house, CHAT, add_special_tokens=True)[1] == "add_special_tokens"


def test_tools_that_are_asked_for_are_refused_where_the_template_knows_none(house: House) -> None:
    assert refusal(house, CHAT, tool_choice="required")[1] == "tool_choice"
    assert refusal(house, CHAT, tools=[{"type": "function", "function": {"name": "f"}}])[1] == "tools"
    for nothing in ({"tools": None}, {"tools": []}, {"tool_choice": "auto"}, {"chat_template_kwargs": {}}):
        assert submitted(house, CHAT, **nothing) == submitted(house, CHAT)
    assert submitted(house, CHAT, tool_choice="none", tools=[], parallel_tool_calls=True) == submitted(house, CHAT)
    assert refusal(house, CHAT, reasoning_effort="low")[1] == "reasoning_effort"


def history(answer: dict[str, Any], **question: Any) -> list[dict[str, Any]]:
    """A conversation that goes on after `answer`."""
    turns = ({"content": "a", **question}, answer, {"content": "b"})
    return [{"role": role, **turn} for role, turn in zip(("user", "assistant", "user"), turns, strict=True)]


HINT = {"type": "ephemeral"}
EPHEMERAL = {"cache_control": HINT}


def test_cache_hints_change_nothing(house: House) -> None:
    plain = submitted(house, CHAT, messages=history({"content": "c"}))
    part = {"type": "text", "text": "a", **EPHEMERAL}
    for question in ({"content": [part]}, {"content": [{**part, "cache_control": None}]}, EPHEMERAL):
        assert submitted(house, CHAT, messages=history({"content": "c"}, **question)) == plain
    answer = {"content": [{"type": "text", "text": "c", **EPHEMERAL}], **EPHEMERAL}
    assert submitted(house, CHAT, messages=history(answer)) == plain
    expected = {"type": "content", "content": [{"type": "text", "text": "x", **EPHEMERAL}]}
    assert submitted(house, CHAT, prediction=expected) == submitted(
        house, CHAT, prediction={"type": "content", "content": "x"}
    )


WITHOUT_TEXT: list[dict[str, Any]] = [
    {},
    {"content": None},
    {"content": ""},
    {"content": []},
    {"content": None, "tool_calls": [], "function_call": None, "refusal": None, "audio": None},
    {"content": None, "tool_calls": None, "reasoning_content": "Let me see."},
    {"content": [{"type": "thinking", "thinking": "Let me see.", "signature": "s"}]},
]


@pytest.mark.parametrize("answer", WITHOUT_TEXT)
def test_turns_of_the_assistant_without_text(house: House, answer: dict[str, Any]) -> None:
    assert submitted(house, CHAT, messages=history(answer)) == submitted(house, CHAT, messages=history({"content": ""}))


SENT_BACK: dict[str, dict[str, Any]] = {
    "openai": {
        **{"content": "c", "refusal": None, "annotations": [], "audio": None, "function_call": None},
        **{"tool_calls": None, "parsed": None},
    },
    "openai with citations": {"content": "c", "annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}]},
    "litellm": {
        **{"content": "c", "tool_calls": None, "function_call": None, "reasoning_content": "r", "images": []},
        "thinking_blocks": [{"type": "thinking", "thinking": "r", "signature": "s"}],
        "provider_specific_fields": {"refusal": None, "reasoning_content": "r"},
    },
    "openrouter": {"content": "c", "reasoning": "r", "reasoning_details": [{"type": "reasoning.text", "text": "r"}]},
    "langchain": {"content": [{"type": "text", "text": "c", "id": "t", "index": 0, "annotations": []}], "id": "run-1"},
    "responses": {"content": [{"type": "output_text", "text": "c", "annotations": [{"type": "x"}], "logprobs": []}]},
    "anthropic": {
        "content": [
            {"type": "thinking", "thinking": "r", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"},
            {"type": "text", "text": "c", "citations": None},
        ]
    },
    "vercel": {"content": [{"type": "reasoning", "text": "r"}, {"type": "text", "text": "c"}], "tool_calls": []},
    "mistral": {"content": "c", "prefix": False, "tool_calls": None},
    "ollama": {"content": "c", "thinking": "r"},
}


@pytest.mark.parametrize("library", SENT_BACK)
def test_an_answer_sent_back_as_it_came(house: House, library: str) -> None:
    plain = submitted(house, CHAT, messages=history({"content": "c"}))
    assert submitted(house, CHAT, messages=history(SENT_BACK[library])) == plain


def test_our_own_answer_sent_back(house: House) -> None:
    message = house.chat().json()["choices"][0]["message"]
    plain = submitted(house, CHAT, messages=history({"content": message["content"]}))
    assert submitted(house, CHAT, messages=history(message)) == plain


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        ({"role": "user", "content": "c", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": None, "refusal": "I will not."}, "messages[0].refusal"),
        ({"role": "assistant", "content": "c", "prefix": True}, "messages[0].prefix"),
        ({"role": "assistant", "content": "c", "images": [{}]}, "messages[0].images"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "messages[0].content[0]"),
        ({"role": "function", "content": "c"}, "messages[0].role"),
        # What a user writes is meant for the model, wherever it stands.
        ({"role": "user", "content": "c", "reasoning_content": "r"}, "messages[0].reasoning_content"),
        ({"role": "system", "content": "c", "thinking": "r"}, "messages[0].thinking"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "r"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "c", "lang": "en"}]}, "messages[0].content[0].lang"),
        ({"role": "user", "content": [{"type": "text", "text": "", "parsed": 1}]}, "messages[0].content[0].parsed"),
    ],
)
def test_text_is_never_lost_in_silence(house: House, turn: dict[str, Any], param: str) -> None:
    assert refusal(house, CHAT, messages=[turn]) == ("unsupported_parameter", param)


def test_empty_fields_inside_messages_and_parts(house: House) -> None:
    plain = submitted(house, CHAT, messages=history({"content": "c"}))
    for value in EMPTY:
        part = {"type": "text", "text": "a", "later": value}
        found = submitted(house, CHAT, messages=history({"content": "c", "later": value}, content=[part], later=value))
        assert found == plain
    for name, values in NEUTRAL_IN_MESSAGE.items():
        for value in (None, *values):
            assert submitted(house, CHAT, messages=history({"content": "c", name: value})) == plain, name
    assert submitted(house, CHAT, messages=history({"content": "c"}, name="")) == plain


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_only_the_assistant_may_go_without_content(house: House, role: str, content: dict[str, Any]) -> None:
    assert refusal(house, CHAT, messages=[{"role": role, **content}]) == ("invalid_value", "messages[0].content")
