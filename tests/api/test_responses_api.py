"""POST /v1/responses and the responses that are kept: shapes, the order of events, turns, failures, a client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from server.api.responses.store import ResponseStore, Stored
from server.errors import EngineUnavailable, Overloaded, RequestFailed
from tests.api.documented import check_answer
from tests.api.fake_engine import FakeEngine
from tests.api.house import HELLO, House, RawCall, events, make_house, say
from tests.tool_templates import HERMES, THINKING

PATH = "/v1/responses"
CALL = 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


@pytest.fixture
def tool_house(tmp_path: Path) -> House:
    return make_house(tmp_path, FakeEngine(say(CALL)), {"template": HERMES})


def ask(house: House, given: Any = "Hi", **fields: Any) -> Any:
    """The answer in one piece, checked against the document."""
    response = house.post(PATH, {"model": "m", "input": given, **fields})
    check_answer(house, response)
    return response


def stream(house: House, given: Any = "Hi", **fields: Any) -> list[Any]:
    """The events of a stream, checked against the document, numbered and named."""
    response = house.post(PATH, {"model": "m", "input": given, "stream": True, **fields})
    assert response.status_code == 200, response.text
    check_answer(house, response)
    found = events(response)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    named = [line.removeprefix("event: ") for line in response.text.split("\n") if line.startswith("event: ")]
    assert named == [event["type"] for event in found]
    return found


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs from one answer to the next."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}


def prompt(house: House) -> str:
    """What the model read last."""
    return house.scribe.text.read_prompt(house.engine.submits[-1].prompt)


def test_text_in_one_piece(house: House) -> None:
    response = ask(house, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, max_output_tokens=50).json()
    (message,) = response["output"]
    assert message["content"] == [{"type": "output_text", "text": HELLO, "annotations": [], "logprobs": []}]
    assert (response["status"], response["store"], response["error"]) == ("completed", True, None)
    assert (response["metadata"], response["temperature"], response["max_output_tokens"]) == ({"a": "b"}, 0.5, 50)
    num_prompt = len(house.engine.submits[0].prompt)
    num_answer = len(HELLO.encode()) + 1
    assert response["usage"] == {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": num_answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + num_answer,
    }
    sampling = house.engine.submits[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 50)
    spelled = "".join(chr(token) for token in house.engine.submits[0].prompt if token < 256)
    assert spelled == "Be brief.Hi"


def test_events_come_in_order(house: House) -> None:
    found = stream(house)
    kinds = [event["type"] for event in found]
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event["delta"] for event in deltas) == HELLO
    first, last = found[0]["response"], found[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert last["output"] == [found[-2]["item"]]
    assert {event["item_id"] for event in deltas} == {last["output"][0]["id"]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_output_tokens": 3},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"store": False, "include": ["reasoning.encrypted_content"]},
    ],
)
def test_both_forms_say_the_same(house: House, fields: dict[str, Any]) -> None:
    assert plain(stream(house, **fields)[-1]["response"]) == plain(ask(house, **fields).json())


def test_a_limit_leaves_it_incomplete(house: House) -> None:
    last = stream(house, max_output_tokens=2)[-1]
    assert last["type"] == "response.incomplete"
    response = last["response"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "He"


def test_an_empty_answer_is_an_empty_message(house: House) -> None:
    house.engine.script = say("")
    for response in (ask(house).json(), stream(house)[-1]["response"]):
        assert response["output"][0]["content"][0]["text"] == ""


def test_logprobs_are_of_each_token(house: House) -> None:
    (message,) = ask(house, include=["message.output_text.logprobs"], top_logprobs=2).json()["output"]
    logprobs = message["content"][0]["logprobs"]
    assert len(logprobs) == len(HELLO.encode())
    assert [entry["token"] for entry in logprobs[:2]] == ["H", "e"]
    assert {len(entry["top_logprobs"]) for entry in logprobs} == {2}


def test_a_failure_half_way_is_one_terminal_event(house: House) -> None:
    house.engine.pause_s, house.engine.fails_after = 0.03, 2
    house.engine.failure = RequestFailed("NaN in the logits")
    found = stream(house)
    assert [event["type"] for event in found].count("response.failed") == 1
    last = found[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "NaN in the logits"}
    assert last["response"]["output"] == []
    assert house.get(f"{PATH}/{last['response']['id']}").status_code == 404
    house.engine.failure = KeyError("secret")
    assert "secret" not in json.dumps(stream(house))
    house.engine.pause_s, house.engine.failure = 0.0, RequestFailed("NaN in the logits")
    response = ask(house)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "request_failed")


@pytest.mark.parametrize("error", [Overloaded("full", retry_after_s=2), EngineUnavailable("gone", retry_after_s=2)])
def test_a_refusal_is_a_status_also_of_a_stream(house: House, error: Any) -> None:
    house.engine.refusal = error
    response = ask(house, stream=True)
    assert (response.status_code, response.headers["retry-after"]) == (error.status, "2")


def test_pings_while_nothing_comes(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("a"), pause_s=0.35), keep_alive_s=0.1)
    assert house.post(PATH, {"model": "m", "input": "Hi", "stream": True}).text.count(": keep-alive\n\n") >= 2


def test_a_client_that_goes_away_aborts_and_nothing_is_kept(house: House) -> None:
    house.engine.script, house.engine.pause_s = say("x" * 500), 0.01

    async def scene() -> str:
        one = RawCall(house.app, json.dumps({"model": "m", "input": "Hi", "stream": True}).encode(), PATH)
        task = asyncio.create_task(one.run())
        await asyncio.sleep(0.1)
        one.gone.set()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 2)
        return str(json.loads(one.text.split("data: ")[1].split("\n")[0])["response"]["id"])

    id_ = asyncio.run(scene())
    assert len(house.engine.aborted) == 1
    assert house.get(f"{PATH}/{id_}").status_code == 404


def test_an_answer_is_gone_on_with(house: House) -> None:
    first = ask(house, instructions="Be brief.").json()
    house.engine.script = say("More")
    second = stream(house, "And?", previous_response_id=first["id"])[-1]["response"]
    text = prompt(house)
    assert second["previous_response_id"] == first["id"]
    assert [text.index(part) for part in ("Hi", HELLO, "And?")] == sorted(
        text.index(part) for part in ("Hi", HELLO, "And?")
    )
    assert "Be brief." not in text  # instructions are of one request
    assert delete(house, first["id"]) == 200
    ask(house, "Third", previous_response_id=second["id"])
    assert all(part in prompt(house) for part in ("Hi", HELLO, "And?", "More", "Third"))


def test_stateless_turns_say_the_same_as_kept_ones(house: House) -> None:
    first = ask(house, store=False).json()
    assert first["store"] is False
    assert house.get(f"{PATH}/{first['id']}").status_code == 404
    assert ask(house, "x", previous_response_id=first["id"]).status_code == 400
    turns = [{"role": "user", "content": "Hi"}, *first["output"], {"role": "user", "content": "And?"}]
    ask(house, turns, store=False)
    stateless = house.engine.submits[-1].prompt
    kept = ask(house).json()
    ask(house, "And?", previous_response_id=kept["id"])
    assert house.engine.submits[-1].prompt == stateless


def test_kept_responses_are_got_listed_and_deleted(house: House) -> None:
    whole = ask(house, [{"role": "user", "content": text} for text in "abc"]).json()
    streamed = stream(house)[-1]["response"]
    for response in (whole, streamed):
        got = house.get(f"{PATH}/{response['id']}")
        check_answer(house, got)
        assert got.json() == response
    path = f"{PATH}/{whole['id']}/input_items"

    def texts(query: str = "") -> list[str]:
        listed = house.get(path + query)
        check_answer(house, listed)
        return [item["content"][0]["text"] for item in listed.json()["data"]]

    assert (texts(), texts("?order=asc"), texts("?limit=1")) == (["c", "b", "a"], ["a", "b", "c"], ["c"])
    first = house.get(path + "?limit=1").json()
    assert first["has_more"] is True
    assert texts(f"?limit=5&after={first['last_id']}") == ["b", "a"]
    for query in ("?limit=0", "?limit=101", "?order=up", "?after=none", "?before=x"):
        assert house.get(path + query).status_code == 400
    assert house.get(f"{PATH}/{whole['id']}?stream=true").status_code == 400
    assert delete(house, whole["id"]) == 200
    assert delete(house, whole["id"]) == 404
    assert house.get(f"{PATH}/{whole['id']}").status_code == 404
    assert house.get(path).status_code == 404


def delete(house: House, id_: str, **options: Any) -> int:
    async def send() -> int:
        async with house.client() as client:
            response = await client.delete(f"{PATH}/{id_}", **options)
            check_answer(house, response)
            return response.status_code

    return asyncio.run(send())


def test_no_key_sees_what_another_one_keeps(tmp_path: Path) -> None:
    house = make_house(tmp_path, api_key=("alpha", "beta"))
    alpha, beta = ({"Authorization": f"Bearer {key}"} for key in ("alpha", "beta"))
    id_ = house.post(PATH, {"model": "m", "input": "secret"}, headers=alpha).json()["id"]
    assert house.get(f"{PATH}/{id_}", headers=beta).status_code == 404
    assert house.get(f"{PATH}/{id_}/input_items", headers=beta).status_code == 404
    assert delete(house, id_, headers=beta) == 404
    later = {"model": "m", "input": "x", "previous_response_id": id_}
    assert house.post(PATH, later, headers=beta).status_code == 400
    assert house.get(f"{PATH}/{id_}", headers=alpha).status_code == 200
    assert house.post(PATH, later, headers=alpha).status_code == 200


def test_the_store_is_bounded_by_count_and_bytes() -> None:
    store = ResponseStore(max_responses=2, max_bytes=100)

    def put(id_: str, size: int) -> None:
        store.put("t", id_, Stored(b"x" * size, b"", b""))

    def kept() -> str:
        return "".join(id_ for id_ in "abcde" if ("t", id_) in store._kept)

    put("a", 10)
    put("b", 10)
    assert store.get("t", "a") is not None  # used last
    put("c", 10)
    assert kept() == "ac"
    put("d", 85)
    assert kept() == "cd"
    put("e", 101)
    assert kept() == "cd"
    assert store.delete("t", "d")
    put("e", 90)
    assert kept() == "ce"


def test_who_keeps_many_pushes_out_its_own() -> None:
    store = ResponseStore(max_responses=3, max_bytes=1000)
    store.put("few", "long", Stored(b"x" * 500, b"", b""))
    for index in range(5):
        store.put("many", str(index), Stored(b"x" * 10, b"", b""))
    assert list(store._kept) == [("few", "long"), ("many", "3"), ("many", "4")]
    store.delete("many", "3")
    store.put("new", "large", Stored(b"x" * 700, b"", b""))  # takes most now, and stays: somebody was told of it
    assert list(store._kept) == [("many", "4"), ("new", "large")]
    store.put("many", "5", Stored(b"x" * 295, b"", b""))
    assert list(store._kept) == [("many", "4"), ("many", "5")]


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path) -> None:
    house = make_house(tmp_path, max_stored_responses=0)
    response = ask(house).json()
    assert response["store"] is False
    assert house.get(f"{PATH}/{response['id']}").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": "x", "mood": "good"}]}, "input[0].mood"),
        ({"input": "a\x00b"}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "x", "text": "t"}]}]}, "input[0].summary[0].type"),
        ({"input": [{"role": "user", "content": "x"}] * 4097}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"foo": 1}, "foo"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"include": ["nothing"]}, "include[0]"),
        ({"metadata": {str(index): "x" for index in range(17)}}, "metadata"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(house: House, fields: dict[str, Any], param: str) -> None:
    response = ask(house, **({"given": fields.pop("input")} if "input" in fields else {}), **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text
    assert param.split("[")[0] in response.json()["error"]["message"]
    assert house.engine.submits == []


@pytest.mark.parametrize("name", ["messages", "logprobs", "tool_choice", "response_format"])
def test_errors_leave_the_clients_values_as_they_are(tool_house: House, name: str) -> None:
    error = ask(tool_house, tools=[TOOL], tool_choice={"type": "function", "name": name}).json()["error"]
    assert (error["message"], error["param"]) == (
        f"'tool_choice' names '{name}', which is none of 'tools'.",
        "tool_choice",
    )


def test_what_asks_for_nothing_passes(house: House) -> None:
    fields = {"truncation": "disabled", "background": False, "conversation": None, "tools": [], "prompt": None}
    more = {"client_metadata": {"a": "b"}, "max_tool_calls": 3, "reasoning": None, "text": None, "user": "u"}
    assert ask(house, **fields, **more).status_code == 200


def test_a_call_is_an_item(tool_house: House) -> None:
    found = stream(tool_house, tools=[TOOL])
    kinds = [event["type"] for event in found if "delta" not in event["type"]]
    assert kinds[6:] == [
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta"]
    message, call = found[-1]["response"]["output"]
    assert message["content"][0]["text"].strip() == "I look."
    assert (call["type"], call["name"], call["status"]) == ("function_call", "get_weather", "completed")
    assert json.loads(call["arguments"]) == {"city": "Köln"}
    assert "".join(deltas) == call["arguments"]
    assert plain(found[-1]["response"]) == plain(ask(tool_house, tools=[TOOL]).json())


def test_a_call_and_what_it_came_to_go_back(tool_house: House) -> None:
    first = ask(tool_house, tools=[TOOL]).json()
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "It rains."}
    tool_house.engine.script = say("Rain.")
    ask(tool_house, [result], previous_response_id=first["id"], tools=[TOOL])
    kept = tool_house.engine.submits[-1].prompt
    ask(tool_house, [{"role": "user", "content": "Hi"}, *first["output"], result], tools=[TOOL], store=False)
    assert tool_house.engine.submits[-1].prompt == kept
    assert "It rains." in prompt(tool_house)
    assert prompt(tool_house).count("get_weather") == 2  # its definition, and one call in the assistant's turn


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_call_has_a_grammar(tool_house: House, choice: Any) -> None:
    assert ask(tool_house, tools=[TOOL], tool_choice=choice).status_code == 200
    assert tool_house.engine.submits[-1].constraint is not None


def test_a_named_function_is_called_once_and_the_response_says_so(tool_house: House) -> None:
    named = {"type": "function", "name": "get_weather"}
    assert ask(tool_house, tools=[TOOL], tool_choice=named).json()["parallel_tool_calls"] is False
    assert ask(tool_house, tools=[TOOL], tool_choice=named, parallel_tool_calls=True).json()["parallel_tool_calls"]
    assert ask(tool_house, tools=[TOOL], tool_choice="required").json()["parallel_tool_calls"] is True


def test_a_call_that_was_cut_short_is_incomplete(tool_house: House) -> None:
    last = stream(tool_house, tools=[TOOL], max_output_tokens=70)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["output"][-1]["status"] == "incomplete"


def test_structured_output_has_a_grammar(house: House) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = ask(house, text=text).json()
    assert house.engine.submits[-1].constraint is not None
    assert response["text"]["format"]["schema"] == schema
    bad = ask(house, text={"format": {**text["format"], "schema": {"type": "nothing"}}})
    assert bad.status_code == 400
    assert bad.json()["error"]["param"].startswith("text.format")


def test_thinking_is_an_item_and_goes_back(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("<think>\nWell.\n</think>\n\nYes.")), {"template": THINKING})
    found = stream(house)
    thought, message = found[-1]["response"]["output"]
    assert thought["content"][0]["text"].strip() == "Well."
    assert message["content"][0]["text"] == "Yes."
    kinds = [event["type"] for event in found]
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    assert plain(found[-1]["response"]) == plain(ask(house).json())
    ask(house, [{"role": "user", "content": "Hi"}, thought, message, {"role": "user", "content": "Sure?"}])
    assert "Well." in prompt(house)
    refused = ask(house, include=["message.output_text.logprobs"])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "include")
    assert ask(house, reasoning={"effort": "none", "summary": "auto"}).status_code == 200


def official(house: House) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=house.client(), max_retries=0)


def test_the_official_client(house: House) -> None:
    async def scene() -> None:
        client = official(house)
        first = await client.responses.create(model="m", input="Hi")
        assert first.output_text == HELLO
        stream = await client.responses.create(model="m", input="Hi", stream=True)
        kinds = [event.type async for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        async with client.responses.stream(model="m", input="And?", previous_response_id=first.id) as manager:
            text = "".join([event.delta async for event in manager if event.type == "response.output_text.delta"])
            final = await manager.get_final_response()
        assert text == final.output_text == HELLO
        got = await client.responses.retrieve(final.id)
        assert got.output_text == HELLO
        items = [item async for item in client.responses.input_items.list(final.id)]
        assert [item.type for item in items] == ["message"]
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as failure:
            await client.responses.create(model="m", input="Hi", background=True)
        assert failure.value.param == "background"

    asyncio.run(scene())


def test_the_official_client_calls_tools(tool_house: House) -> None:
    async def scene() -> None:
        client = official(tool_house)
        tool: Any = {**TOOL, "strict": False}
        async with client.responses.stream(model="m", input="Hi", tools=[tool]) as manager:
            final = await manager.get_final_response()
        (call,) = [item for item in final.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": "Köln"}

    asyncio.run(scene())
