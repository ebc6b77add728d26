"""POST /v1/messages and count_tokens: shapes, events, errors in Anthropic's form, keys, the official client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from server.errors import EngineUnavailable, Overloaded, RequestFailed
from tests.api.documented import check_answer
from tests.api.fake_engine import FakeEngine
from tests.api.house import HELLO, House, events, make_house, say
from tests.tool_templates import HERMES, THINKING

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
CALL = 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


@pytest.fixture
def tool_house(tmp_path: Path) -> House:
    return make_house(tmp_path, FakeEngine(say(CALL)), {"template": HERMES})


def ask(house: House, path: str = PATH, **fields: Any) -> Any:
    """The answer in one piece, checked against the document."""
    body = {"model": "m", "messages": [USER], **({"max_tokens": 200} if path == PATH else {}), **fields}
    response = house.post(path, body)
    check_answer(house, response)
    return response


def stream(house: House, **fields: Any) -> list[Any]:
    """The events of a stream, checked against the document, each under its name."""
    response = ask(house, stream=True, **fields)
    assert response.status_code == 200, response.text
    found = events(response)
    named = [line.removeprefix("event: ") for line in response.text.split("\n") if line.startswith("event: ")]
    assert named == [event["type"] for event in found]
    return found


def joined(found: list[Any]) -> dict[str, Any]:
    """The message that the events of a stream make."""
    message: dict[str, Any] = {}
    for event in found:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "partial": ""})
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial"}[delta["type"]]
            block[name] += delta["partial_json" if name == "partial" else name]
        elif event["type"] == "content_block_stop":
            block = message["content"][event["index"]]
            partial = block.pop("partial")
            if block["type"] == "tool_use":
                block["input"] = json.loads(partial)
        elif event["type"] == "message_delta":
            message |= {**event["delta"], "usage": event["usage"]}
    return message


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what differs from one answer to the next."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "id": "", "content": content}


def prompt(house: House) -> str:
    """What the model read last."""
    return house.scribe.text.read_prompt(house.engine.submits[-1].prompt)


def test_text_in_one_piece(house: House) -> None:
    message = ask(house, system="Be brief.", temperature=0.5, top_k=3, metadata={"user_id": "u"}).json()
    assert message["content"] == [{"type": "text", "text": HELLO}]
    assert (message["stop_reason"], message["stop_sequence"], message["model"]) == ("end_turn", None, "m")
    num_prompt = len(house.engine.submits[0].prompt)
    assert message["usage"] == {
        "input_tokens": num_prompt - 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": len(HELLO.encode()) + 1,
    }
    sampling = house.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 3, 200)
    assert "Be brief." in prompt(house)


def test_events_come_in_order(house: House) -> None:
    found = stream(house)
    kinds = [event["type"] for event in found]
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * kinds.count("content_block_delta"),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("fields", "reason", "stop"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["zzz", "wö"]}, "stop_sequence", "wö"),
        ({"stop_sequences": ["l", "llo"]}, "stop_sequence", "l"),
    ],
)
def test_both_forms_say_the_same_and_why_they_ended(
    house: House, fields: dict[str, Any], reason: str, stop: str | None
) -> None:
    whole = ask(house, **fields).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop)
    assert plain(joined(stream(house, **fields))) == plain(whole)


def test_an_empty_answer_has_no_block(house: House) -> None:
    house.engine.script = say("")
    assert ask(house).json()["content"] == []
    assert joined(stream(house))["content"] == []


def test_a_failure_half_way_is_the_last_event(house: House) -> None:
    house.engine.pause_s, house.engine.fails_after = 0.03, 2
    house.engine.failure = RequestFailed("NaN in the logits")
    found = stream(house)
    kinds = [event["type"] for event in found]
    assert kinds.count("error") == 1
    assert "message_stop" not in kinds
    assert found[-1] == {"type": "error", "error": {"type": "api_error", "message": "NaN in the logits"}}
    response = ask(house)
    assert (response.status_code, response.json()["error"]["type"]) == (500, "api_error")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after_s=2), "rate_limit_error"),
        (EngineUnavailable("gone", retry_after_s=2), "overloaded_error"),
    ],
)
def test_a_refusal_is_a_status_also_of_a_stream(house: House, error: Any, kind: str) -> None:
    house.engine.refusal = error
    response = ask(house, stream=True)
    assert (response.status_code, response.headers["retry-after"]) == (error.status, "2")
    assert response.json()["error"]["type"] == kind


def test_pings_are_events(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("a"), pause_s=0.35), keep_alive_s=0.1)
    assert [event["type"] for event in stream(house)].count("ping") >= 3


def test_errors_have_anthropics_shape(tmp_path: Path) -> None:
    house = make_house(tmp_path, api_key=("k",), max_body_bytes=1024)
    key = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    body = {"model": "m", "max_tokens": 5, "messages": [USER]}

    def kind(path: str = PATH, headers: dict[str, str] = key, **fields: Any) -> tuple[int, str]:
        response = house.post(path, {**body, **fields}, headers=headers)
        value = response.json()
        assert value.keys() == {"type", "error"}
        assert value["type"] == "error"
        return response.status_code, value["error"]["type"]

    assert kind(headers={}) == (401, "authentication_error")
    assert kind(headers={"x-api-key": "other"}) == (401, "authentication_error")
    assert kind(max_tokens=0) == (400, "invalid_request_error")
    assert kind(model="nope") == (404, "not_found_error")
    assert kind(PATH + "/batches") == (404, "not_found_error")
    assert kind(system="x" * 2000) == (413, "request_too_large")
    assert house.get(PATH, headers=key).json()["error"]["type"] == "invalid_request_error"
    assert house.get("/v1/messagesx", headers=key).json()["error"]["code"] == "not_found"


def test_the_key_may_come_either_way(tmp_path: Path) -> None:
    house = make_house(tmp_path, api_key=("alpha", "beta"))
    body = {"model": "m", "max_tokens": 5, "messages": [USER]}

    def status(headers: dict[str, str]) -> int:
        return house.post(PATH, body, headers=headers).status_code

    assert status({"x-api-key": "alpha"}) == 200
    assert status({"Authorization": "Bearer alpha"}) == 200
    assert status({"Authorization": "Bearer nope", "x-api-key": "alpha"}) == 401
    assert status({"Authorization": "Bearer beta", "x-api-key": "alpha"}) == 200
    assert status({"x-api-key": ""}) == 401
    first, *_, last = (submit.tenant for submit in house.engine.submits)
    assert first != last  # Authorization counts first
    assert house.get("/v1/models", headers={"x-api-key": "alpha"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": []}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, "messages[0].content"),
        ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood"),
        ({"system": 5}, "system"),
        ({"foo": 1}, "foo"),
        ({"container": "c"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"mcp_servers": [{"url": "u"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(house: House, fields: dict[str, Any], named: str) -> None:
    response = ask(house, **fields)
    assert response.status_code == 400
    assert f"'{named}'" in response.json()["error"]["message"]
    assert house.engine.submits == []


def test_a_client_may_go_on_without_a_thread(house: House) -> None:
    response = ask(house, thread={"type": "create"})
    assert response.status_code == 400
    details = response.json()["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert ask(house, thread=None).status_code == 200


@pytest.mark.parametrize("count", [5, 17])
def test_one_limit_of_stop_sequences_is_told(house: House, count: int) -> None:
    error = ask(house, stop_sequences=["x"] * count).json()["error"]
    assert error["message"] == f"'stop_sequences' may hold at most 4 strings (--max-stop-strings), got {count}."


@pytest.mark.parametrize("kind", ["image", "document"])
def test_what_is_no_text_is_refused_for_that(house: House, kind: str) -> None:
    error = ask(house, messages=[{"role": "user", "content": [{"type": kind, "source": {}}]}]).json()["error"]
    assert error["message"] == f"'messages[0].content[0]' is of type '{kind}': this model reads text only."


def test_what_asks_for_nothing_passes(house: House) -> None:
    kept = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    cached = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    fields = {"context_management": kept, "container": None, "mcp_servers": [], "service_tier": "auto"}
    more = {"system": [cached], "messages": [{"role": "user", "content": [cached]}], "tools": []}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    assert ask(house, **fields, **more, **thinking).status_code == 200


def test_tokens_are_counted_as_they_are_read(tool_house: House) -> None:
    fields = {"system": "Be brief.", "tools": [TOOL]}
    count = ask(tool_house, COUNT, **fields).json()["input_tokens"]
    usage = ask(tool_house, **fields).json()["usage"]
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert count > ask(tool_house, COUNT).json()["input_tokens"]
    assert ask(tool_house, COUNT, model="nope").status_code == 404
    assert ask(tool_house, COUNT, max_tokens=5).status_code == 400


def test_a_call_is_a_block(tool_house: House) -> None:
    whole = ask(tool_house, tools=[TOOL]).json()
    text, call = whole["content"]
    assert text["text"].strip() == "I look."
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Köln"})
    assert whole["stop_reason"] == "tool_use"
    assert plain(joined(stream(tool_house, tools=[TOOL]))) == plain(whole)


def test_a_call_that_was_cut_short_is_left_out(tool_house: House) -> None:
    message = ask(tool_house, tools=[TOOL], max_tokens=70).json()
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["stop_reason"] == "max_tokens"


def test_a_forced_call_that_was_cut_in_its_head_leaves_no_text(tool_house: House) -> None:
    begun = '<tool_call>\n{"name": "get_wea'
    tool_house.engine.script = say(begun)
    fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": len(begun)}
    message = ask(tool_house, **fields).json()
    assert (message["content"], message["stop_reason"]) == ([], "max_tokens")
    assert joined(stream(tool_house, **fields))["content"] == []
    assert ask(tool_house, **{**fields, "tool_choice": {"type": "auto"}}).json()["content"][0]["text"] == begun


def test_a_call_and_what_it_came_to_go_back(tool_house: House) -> None:
    first = ask(tool_house, tools=[TOOL]).json()
    tool_house.engine.script = say("Rain.")
    result = {
        "type": "tool_result",
        "tool_use_id": first["content"][-1]["id"],
        "content": [{"type": "text", "text": "It rains."}],
    }
    turns = [
        USER,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    assert ask(tool_house, messages=turns, tools=[TOOL]).json()["stop_reason"] == "end_turn"
    text = prompt(tool_house)
    places = [text.index(part) for part in ("I look.", "Köln", "It rains.", "So?")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("choice", "is_bound"),
    [
        ({"type": "any"}, True),
        ({"type": "tool", "name": "get_weather"}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True),
        ({"type": "auto"}, False),
        ({"type": "none"}, False),
    ],
)
def test_choices_of_tools(tool_house: House, choice: dict[str, Any], is_bound: bool) -> None:
    assert ask(tool_house, tools=[TOOL], tool_choice=choice).status_code == 200
    assert (tool_house.engine.submits[-1].constraint is not None) == is_bound


def test_structured_output_has_a_grammar(house: House) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert ask(house, output_config={"format": {"type": "json_schema", "schema": schema}}).status_code == 200
    assert house.engine.submits[-1].constraint is not None


def test_thinking_is_a_block_and_goes_back(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("<think>\nWell.\n</think>\n\nYes.")), {"template": THINKING})
    whole = ask(house, thinking={"type": "adaptive"}).json()
    thought, text = whole["content"]
    assert (thought["thinking"].strip(), thought["signature"], text["text"]) == ("Well.", "", "Yes.")
    assert plain(joined(stream(house))) == plain(whole)
    omitted = ask(house, thinking={"type": "adaptive", "display": "omitted"}).json()
    assert [block["type"] for block in omitted["content"]] == ["text"]
    turns = [USER, {"role": "assistant", "content": [thought, text]}, {"role": "user", "content": "Sure?"}]
    ask(house, messages=turns)
    assert "Well." in prompt(house)
    ask(house, thinking={"type": "disabled"})
    assert prompt(house).endswith("<think>\n\n</think>\n\n")


def test_the_official_client(tool_house: House) -> None:
    async def scene() -> None:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(tool_house.app), base_url="http://test")  # type: ignore[arg-type]
        client = anthropic.AsyncAnthropic(api_key="x", base_url="http://test", http_client=http, max_retries=0)
        tools: Any = [TOOL]
        message = await client.messages.create(model="m", max_tokens=200, messages=[USER], tools=tools)  # type: ignore[list-item]
        assert message.stop_reason == "tool_use"
        async with client.messages.stream(model="m", max_tokens=200, messages=[USER], tools=tools) as events_:  # type: ignore[list-item]
            text = "".join([part async for part in events_.text_stream])
            final = await events_.get_final_message()
        assert text.strip() == "I look."
        assert final.content[-1].input == {"city": "Köln"}  # type: ignore[union-attr]
        assert final.usage.output_tokens == message.usage.output_tokens
        count = await client.messages.count_tokens(model="m", messages=[USER])  # type: ignore[list-item]
        assert count.input_tokens > 0
        with pytest.raises(anthropic.NotFoundError) as failure:
            await client.messages.create(model="nope", max_tokens=5, messages=[USER])  # type: ignore[list-item]
        assert "does not exist" in failure.value.message

    asyncio.run(scene())
