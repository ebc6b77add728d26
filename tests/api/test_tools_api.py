"""Tools in chat completions: what is asked, what is forced, and the same calls whether an answer is streamed or not."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import llguidance
import openai
import pytest

from tests.api.documented import check_answer
from tests.api.fake_engine import FakeEngine, ready
from tests.api.house import House, chat_body, events, make_house, say
from tests.tool_templates import CALLS_ALONE, HERMES, NO_TOOLS, call, tool

CHAT = "/v1/chat/completions"
PARIS = '{"city": "Paris"}'
TWO = (
    f'Let me look.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "search", "arguments": {"q": "Köln €"}}\n</tool_call>'
)
CALLS = [("get_weather", PARIS), ("search", '{"q": "Köln €"}')]
TOOLS = [tool(), tool("search", parameters=None)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("model"), FakeEngine(say(TWO)), {"template": HERMES})


@pytest.fixture
def house(shared: House) -> House:
    shared.engine.script, shared.engine.step, shared.engine.info = say(TWO), 1, ready()
    shared.engine.submits.clear()
    return shared


def streamed(house: House, **fields: Any) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """The messages and finish reasons that the chunks of a stream make."""
    response = house.chat(stream=True, **fields)
    check_answer(house, response)
    messages: dict[int, dict[str, Any]] = {}
    reasons: dict[int, str] = {}
    *chunks, end = events(response)
    assert end == "[DONE]"
    for chunk in chunks:
        for choice in chunk["choices"]:
            message = messages.setdefault(choice["index"], {"content": None})
            for key in ("content", "reasoning_content"):
                if key in choice["delta"]:
                    message[key] = (message.get(key) or "") + choice["delta"][key]
            for delta in choice["delta"].get("tool_calls", ()):
                add(message.setdefault("tool_calls", []), delta)
            if choice["finish_reason"]:
                assert choice["delta"] == {}
                reasons[choice["index"]] = choice["finish_reason"]
    return messages, reasons


def add(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """A delta of a call: the first has id, type and name, the others arguments alone."""
    if delta["index"] == len(calls):
        assert delta["id"]
        assert delta["type"] == "function"
        assert delta["function"]["arguments"] == ""
        calls.append({"id": delta["id"], "name": delta["function"]["name"], "arguments": ""})
    else:
        assert delta.keys() == {"index", "function"}
        assert delta["function"].keys() == {"arguments"}
        calls[delta["index"]]["arguments"] += delta["function"]["arguments"]


def pairs(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = [one.get("function", one) for one in message.get("tool_calls", ())]
    return [(one["name"], one["arguments"]) for one in calls]


@pytest.mark.parametrize("step", [1, 3, 7, 1000])
def test_the_same_calls_streamed_or_not(house: House, step: int) -> None:
    house.engine.step = step
    response = house.chat(tools=TOOLS, n=2)
    check_answer(house, response)
    messages, reasons = streamed(house, tools=TOOLS, n=2)
    ids = set()
    for choice in response.json()["choices"]:
        whole, parts = choice["message"], messages[choice["index"]]
        assert choice["finish_reason"] == reasons[choice["index"]] == "tool_calls"
        assert whole["content"] == parts["content"] == "Let me look."
        assert pairs(whole) == pairs(parts) == CALLS
        ids |= {one["id"] for one in (*whole["tool_calls"], *parts["tool_calls"])}
    assert len(ids) == 8


def test_arguments_come_piece_by_piece(house: House) -> None:
    chunks = events(house.chat(tools=TOOLS, stream=True))[:-1]
    deltas = [chunk["choices"][0]["delta"].get("tool_calls", [{}])[0] for chunk in chunks]
    assert len([delta for delta in deltas if delta.get("index") == 0]) > len(PARIS) // 2


def test_content_is_null_without_text(house: House) -> None:
    house.engine.script = say(TWO.removeprefix("Let me look.\n"))
    assert house.chat(tools=TOOLS).json()["choices"][0]["message"]["content"] is None
    assert streamed(house, tools=TOOLS)[0][0]["content"] is None


@pytest.mark.parametrize("fields", [{"tools": TOOLS, "tool_choice": "none"}, {}, {"tools": []}])
def test_without_tools_all_is_content(house: House, fields: dict[str, Any]) -> None:
    message = house.chat(**fields).json()["choices"][0]["message"]
    assert message["content"] == TWO
    assert "tool_calls" not in message
    assert b"Tools:" not in bytes(token for token in house.engine.submits[-1].prompt if token < 256)
    assert streamed(house, **fields)[0][0]["content"] == TWO


@pytest.mark.parametrize(
    "text", ['<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', "<tool_call>\n{oops}", "Hello  \n"]
)
def test_a_broken_call_is_content(house: House, text: str) -> None:
    house.engine.script = say(text)
    choice = house.chat(tools=TOOLS).json()["choices"][0]
    messages, reasons = streamed(house, tools=TOOLS)
    assert choice["message"]["content"] == messages[0]["content"] == text
    assert choice["finish_reason"] == reasons[0] == "stop"


def test_a_cut_call_ends_by_its_length(house: House) -> None:
    most = TWO.index("Paris")
    choice = house.chat(tools=TOOLS, max_tokens=most).json()["choices"][0]
    messages, reasons = streamed(house, tools=TOOLS, max_tokens=most)
    assert pairs(choice["message"]) == pairs(messages[0]) == [("get_weather", '{"city": "')]
    assert choice["finish_reason"] == reasons[0] == "length"


def test_log_probabilities_of_all_tokens_are_told(house: House) -> None:
    whole = house.chat(tools=TOOLS, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = events(house.chat(tools=TOOLS, logprobs=True, stream=True))[:-1]
    told = [choice["logprobs"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [one for part in told for one in part] == whole
    assert len(whole) == len(TWO.encode())


def test_a_special_token_that_begins_calls_is_seen(tmp_path: Path) -> None:
    template = NO_TOOLS + "{{ tools | tojson }}{# [TOOL_CALLS] #}"
    house = make_house(tmp_path, FakeEngine(lambda _: []), {"template": template, "more": ("[TOOL_CALLS]",)})
    mark = house.scribe.text.added_token("[TOOL_CALLS]")
    assert mark is not None
    text = f' [{{"name": "get_weather", "arguments": {PARIS}}}]'
    house.engine.script = lambda _: [mark, *text.encode()]
    message = house.chat(tools=TOOLS).json()["choices"][0]["message"]
    assert pairs(message) == [("get_weather", PARIS)]
    assert len(message["tool_calls"][0]["id"]) == 9
    assert house.chat().json()["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("fields", "is_bound"),
    [
        ({}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "search"}}}, True),
        ({"parallel_tool_calls": False}, True),
        ({"tools": [tool(strict=True)]}, True),
        ({"tool_choice": "none"}, False),
    ],
)
def test_what_is_forced_binds_the_answer(house: House, fields: dict[str, Any], is_bound: bool) -> None:
    assert house.chat(**{"tools": TOOLS, **fields}).status_code == 200
    constraint = house.engine.submits[-1].constraint
    assert (constraint is not None) == is_bound
    if fields.get("tool_choice") not in (None, "none", "auto", "required"):
        assert constraint is not None
        assert "search" in constraint.grammar
        assert "get_weather" not in constraint.grammar


def test_allowed_tools_are_the_only_ones(house: House) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("search")]}}
    message = house.chat(tools=TOOLS, tool_choice=choice).json()["choices"][0]["message"]
    assert pairs(message) == CALLS[1:]
    choice["allowed_tools"]["mode"] = "required"  # type: ignore[index]
    house.chat(tools=TOOLS, tool_choice=choice)
    constraint = house.engine.submits[-1].constraint
    assert constraint is not None
    assert "get_weather" not in constraint.grammar


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "is_single"),
    [
        ({"tool_choice": named("search")}, True),
        ({"tool_choice": named("search"), "parallel_tool_calls": True}, False),
        ({"tool_choice": "required"}, False),
        ({"tool_choice": "required", "parallel_tool_calls": False}, True),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [named("search")]},
                }
            },
            False,
        ),
    ],
)
def test_a_named_function_is_called_once(house: House, fields: dict[str, Any], is_single: bool) -> None:
    one = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
    assert house.chat(tools=TOOLS, **fields).status_code == 200
    assert takes(house, one)
    assert takes(house, f"{one}\n{one}") != is_single


@pytest.mark.parametrize(
    ("parameters", "takes_any"),
    [
        ({"type": "object", "properties": {}}, False),
        ({"properties": {}, "required": [], "title": "None"}, False),
        (None, False),
        ({"type": "object", "properties": {}, "additionalProperties": True}, True),
        ({"type": "object", "properties": {}, "minProperties": 1}, True),
        ({"type": "object"}, True),
        ({}, True),
    ],
)
def test_a_function_without_properties_takes_no_arguments(house: House, parameters: Any, takes_any: bool) -> None:
    tools = [tool("search", parameters=parameters)]
    assert house.chat(tools=tools, tool_choice="required").status_code == 200
    assert takes(house, '<tool_call>\n{"name": "search", "arguments": {"a": 1}}\n</tool_call>') == takes_any


def takes(house: House, text: str) -> bool:
    """Whether the last answer was bound so that it may be this text."""
    constraint = house.engine.submits[-1].constraint
    assert constraint is not None
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, constraint.grammar)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


def test_calls_and_results_go_back_as_they_came(house: House) -> None:
    message = house.chat(tools=TOOLS).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "sunny"} for one in message["tool_calls"]]
    messages = [{"role": "user", "content": "Hi"}, message, *results]
    assert house.chat(tools=TOOLS, messages=messages).status_code == 200
    prompt = bytes(token for token in house.engine.submits[-1].prompt if token < 256).decode()
    assert TWO in prompt
    assert prompt.count("<tool_response>\nsunny\n</tool_response>") == 2


ASK = {"role": "user", "content": "Hi"}
SUNNY = {"role": "tool", "tool_call_id": "1", "content": "sunny"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [tool()] * 129}, "tools", "at most 128"),
        ({"tools": [tool(f"f{index}") for index in range(10_000)]}, "tools", "at most 128"),
        ({"tools": [tool(description="x" * 2**20)]}, "tools", "262144 bytes"),
        ({"tools": [tool(description="a\x00b")]}, "tools", "NUL"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "another tool"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "must match"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name", "must match"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", "object"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", "object"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "only functions"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [tool(more=1)]}, "tools[0].function.more", "Unknown"),
        ({"tools": [tool(parameters={"x-guidance": {}})]}, "tools[0].function.parameters.x-guidance", "not supported"),
        ({"tools": "x"}, "tools", "array"),
        ({"tools": [1]}, "tools[0]", "object"),
        ({"tool_choice": "required"}, "tool_choice", "no 'tools'"),
        ({"tool_choice": named("f")}, "tool_choice", "no 'tools'"),
        ({"tools": [tool()], "tool_choice": named("f")}, "tool_choice", "none of 'tools'"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice", "must be"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice", "must be"),
        ({"functions": [{"name": "f"}]}, "functions", "'tools'"),
        ({"function_call": {"name": "f"}}, "function_call", "'tool_choice'"),
        ({"messages": [ASK, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "required"),
        ({"messages": [ASK, {"role": "tool", "tool_call_id": "1"}]}, "messages[1].content", "required"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0].id", "required"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [call("x" * 2**20)]}]},
            "messages[1].tool_calls[0].function.arguments",
            "524288 characters",
        ),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [call()] * 129}]}, "messages[1].tool_calls", "128"),
        ({"chat_template_kwargs": {"x": "y" * 5000}}, "chat_template_kwargs", "4096 bytes"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "set by the server"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs", "object"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort", "must be"),
    ],
)
def test_bad_tools(house: House, fields: dict[str, Any], param: str, words: str) -> None:
    started = time.monotonic()
    response = house.post(CHAT, chat_body(**fields))
    assert time.monotonic() - started < 1.0
    check_answer(house, response)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"], error["message"]
    assert not house.engine.submits


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tool_choice": "required", "min_tokens": 2}, "min_tokens"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [tool(strict=True)], "ignore_eos": True}, "ignore_eos"),
        ({"parallel_tool_calls": False, "min_tokens": 2}, "min_tokens"),
    ],
)
def test_tools_and_other_forms_do_not_go_together(house: House, fields: dict[str, Any], param: str) -> None:
    fields = {"tools": TOOLS, **fields}
    error = house.chat(**fields).json()["error"]
    assert error["param"] == param
    assert "'tool" in error["message"]
    assert house.chat(**{**fields, "tool_choice": "none"}).status_code == 200
    assert house.chat(tools=TOOLS, response_format={"type": "text"}).status_code == 200


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_form_of_the_content_may_stand_beside_a_call_that_must_be(house: House, choice: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "title": "the_form"}}}
    assert house.chat(tools=TOOLS, tool_choice=choice).status_code == 200
    assert house.chat(tools=TOOLS, tool_choice=choice, response_format=form).status_code == 200
    alone, beside = (submit.constraint for submit in house.engine.submits)
    assert alone is not None
    assert alone == beside


def deep(depth: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": deep(depth - 1)}} if depth else {"type": "string"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"$ref": "https://example.org/schema"},
        {"allOf": [{"$ref": "#/$defs/a"}] * 2, "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"properties": {"a": {"pattern": "(?=x)y", "type": "string"}}, "required": ["a"]},
        {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}, "required": ["a"]},
        {"properties": {"a": {"type": "number", "exclusiveMinimum": 0, "minimum": "x"}}, "required": ["a"]},
        {"properties": {"a": {"type": "number", "exclusiveMaximum": 0, "maximum": None}}, "required": ["a"]},
        {"allOf": [{"oneOf": [{"properties": {f"p{n}": {"enum": [n]}}}, {"required": [f"q{n}"]}]} for n in range(400)]},
    ],
)
def test_schemas_that_cannot_be_forced_are_refused_at_once(house: House, parameters: dict[str, Any]) -> None:
    house.engine.info = ready(200_000)
    started = time.monotonic()
    response = house.chat(tools=[tool(parameters=parameters)], tool_choice="required")
    assert time.monotonic() - started < 2.0
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


def test_empty_values_in_tools_ask_for_nothing(house: House) -> None:
    full = {**tool(strict=None, description=None, later={}), "cache_control": {"type": "ephemeral"}, "more": None}
    assert house.chat(tools=[full]).status_code == 200
    house.chat(tools=[tool()])
    assert house.engine.submits[0].prompt == house.engine.submits[1].prompt


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    plain = make_house(tmp_path / "plain")
    forced = make_house(tmp_path / "forced", tool_call_parser="hermes")
    for house, words in ((plain, "--tool-call-parser"), (forced, "no place for tools")):
        error = house.chat(tools=TOOLS).json()["error"]
        assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
        assert words in error["message"]


def test_the_parser_can_be_chosen(tmp_path: Path) -> None:
    text = f'{{"name": "get_weather", "parameters": {PARIS}}}'
    seen = make_house(tmp_path / "seen", FakeEngine(say(text)), {"template": CALLS_ALONE})
    told = make_house(tmp_path / "told", FakeEngine(say(text)), {"template": HERMES}, tool_call_parser="llama3")
    for house in (seen, told):
        assert pairs(house.chat(tools=TOOLS).json()["choices"][0]["message"]) == [("get_weather", PARIS)]


def test_the_official_client_reads_the_calls(house: House) -> None:
    async def ask() -> tuple[Any, Any]:
        async with house.client() as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="k", http_client=http)
            wish: dict[str, Any] = {"model": "m", "messages": [ASK], "tools": TOOLS}
            whole = await client.chat.completions.create(**wish)
            async with client.chat.completions.stream(**wish) as stream:
                return whole, await stream.get_final_completion()

    for completion in asyncio.run(ask()):
        choice = completion.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me look."
        assert [(one.function.name, one.function.arguments) for one in choice.message.tool_calls] == CALLS
        assert json.loads(choice.message.tool_calls[1].function.arguments) == {"q": "Köln €"}


def test_numbers_of_any_size_come_to_the_template(house: House) -> None:
    """64 bits hold no more than 20 digits."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 10**30}}}
    assert house.chat(tools=[tool(parameters=schema)]).status_code == 200
    prompt = bytes(token for token in house.engine.submits[-1].prompt if token < 256)
    assert f'"maximum": {10**30}'.encode() in prompt
    error = house.chat(chat_template_kwargs={"more": {"n": -(10**30)}}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "chat_template_kwargs.more")
