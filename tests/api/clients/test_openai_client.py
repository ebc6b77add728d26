"""The `openai` library, unchanged: chats, completions, parsed answers, streams, responses, tools, errors, retries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from server.errors import EngineUnavailable, Overloaded, RequestFailed
from tests.api.clients.polite import TEXT
from tests.api.clients.scripted import KEY, Scripted
from tests.tool_templates import tool

ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
WEATHER: ChatCompletionToolParam = tool()  # type: ignore[assignment]
CALL = 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


class Booking(BaseModel):
    name: str
    guests: int
    size: Literal["small", "large"]
    notes: list[str] = []


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int | None = None


@pytest.fixture
def client(polite_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=polite_url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def told(scripted: Scripted) -> Iterator[openai.OpenAI]:
    """A client of the server whose answers the test writes."""
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m", "also-m"]
    assert client.models.retrieve("m").id == "m"


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=ASKED, logprobs=True, top_logprobs=2, n=2, seed=1)
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content).startswith(TEXT)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * (len(TEXT) + 1)


def test_a_stream_of_a_chat(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.create(model="m", messages=ASKED, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT) + 1


def test_a_completion_and_its_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="m", prompt='say "', max_tokens=3, logprobs=1)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (TEXT[:3], "length")
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.tokens == list(TEXT[:3])
    several = client.completions.create(model="m", prompt=['say "', 'and "'], max_tokens=30)
    assert [choice.text for choice in several.choices] == [TEXT, TEXT]
    with client.completions.create(model="m", prompt='say "', max_tokens=30, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_raw_responses_have_the_headers(client: openai.OpenAI) -> None:
    headers = {"X-Request-Id": "from-a-test"}
    raw = client.chat.completions.with_raw_response.create(model="m", messages=ASKED, extra_headers=headers)
    assert (raw.status_code, raw.headers["x-request-id"]) == (200, "from-a-test")
    assert raw.parse().choices[0].message.content == TEXT
    assert client.chat.completions.create(model="m", messages=ASKED)._request_id


async def test_the_async_client(polite_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=polite_url, api_key=KEY, max_retries=0) as client:
        answer = await client.chat.completions.create(model="m", messages=ASKED)
        assert answer.choices[0].message.content == TEXT
        stream = await client.chat.completions.create(model="m", messages=ASKED, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


def test_an_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="m", messages=ASKED, response_format=Booking)
    booking = answer.choices[0].message.parsed
    assert booking is not None
    assert (booking.name, booking.guests, booking.size) == (TEXT, 3, "large")
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="m", messages=ASKED, response_format=Booking, max_tokens=5)


def test_the_arguments_of_calls_are_parsed_into_a_model(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    answer = client.chat.completions.parse(model="m", messages=ASKED, tools=tools, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Weather)
    assert call.function.parsed_arguments.city == TEXT


def test_the_stream_helper_tells_what_is_said_and_parsed(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="m", messages=ASKED, response_format=Booking) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert kinds.count("content.done") == 1
    said = "".join(event.delta for event in events if event.type == "content.delta")
    assert final.choices[0].message.content == said
    assert final.choices[0].message.parsed == Booking.model_validate_json(said)


def test_the_stream_helper_tells_calls(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Weather)]
    choice: Any = {"type": "function", "function": {"name": "Weather"}}
    with client.chat.completions.stream(model="m", messages=ASKED, tools=tools, tool_choice=choice) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(event.arguments_delta for event in deltas) == done.arguments
    assert (done.name, done.parsed_arguments) == ("Weather", Weather.model_validate_json(done.arguments))
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_call_by_choice_and_its_result(told: openai.OpenAI, scripted: Scripted) -> None:
    scripted.answer_in_turn(CALL, "It rains.")
    first = told.chat.completions.create(model="m", messages=ASKED, tools=[WEATHER]).choices[0].message
    assert first.tool_calls is not None
    result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
    again: Any = [*ASKED, first, result]
    second = told.chat.completions.create(model="m", messages=again, tools=[WEATHER])
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It rains.", "stop")
    assert "Köln" in scripted.prompts()[1]
    with told.chat.completions.stream(model="m", messages=again, tools=[WEATHER]) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == "It rains."


def test_a_response_and_its_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="m", input="Hi", instructions="Be brief.")
    assert (whole.output_text, whole.status) == (TEXT, "completed")
    assert client.responses.retrieve(whole.id).output_text == TEXT
    more = client.responses.create(model="m", input="And?", previous_response_id=whole.id)
    assert more.output_text == TEXT
    assert [item.type for item in client.responses.input_items.list(more.id)] == ["message"]
    client.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)
    with client.responses.stream(model="m", input="Hi") as stream:
        said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert said == stream.get_final_response().output_text == TEXT


def test_a_response_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="m", input="Hi", text_format=Booking)
    assert answer.output_parsed == Booking(name=TEXT, guests=3, size="large", notes=answer.output_parsed.notes)  # type: ignore[union-attr]
    with client.responses.stream(model="m", input="Hi", text_format=Booking) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == answer.output_parsed


def test_a_response_calls_tools(client: openai.OpenAI) -> None:
    declared: Any = [{"type": "function", **openai.pydantic_function_tool(Weather)["function"]}]
    whole = client.responses.create(model="m", input="Hi", tools=declared, tool_choice="required")
    (call,) = whole.output
    assert call.type == "function_call"
    assert Weather.model_validate_json(call.arguments).city == TEXT
    with client.responses.stream(model="m", input="Hi", tools=declared, tool_choice="required") as stream:
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("store", [True, False])
def test_the_tool_runner_goes_on_until_nothing_is_called(
    told: openai.OpenAI, scripted: Scripted, streams: bool, store: bool
) -> None:
    runner = pytest.importorskip("openai.lib.responses_tool_runner")
    scripted.answer_in_turn(CALL, "It rains.")
    asked: list[dict[str, object]] = []

    def execute(arguments: dict[str, object]) -> str:
        asked.append(arguments)
        return "rain"

    declared: Any = {"type": "function", "strict": False, **WEATHER["function"]}
    functions = [runner.RegisteredFunction(declared, execute)]
    params: Any = {"model": "m", "input": "How is the weather?", "store": store}
    final = runner.ResponsesToolRunner(functions=functions).run(told, params, max_steps=4, stream=streams)
    assert (final.output_text, asked) == ("It rains.", [{"city": "Köln"}])
    assert "rain" in scripted.prompts()[1]


def test_errors_are_of_the_library_s_kinds(client: openai.OpenAI, polite_url: str) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="m", messages=ASKED, temperature=9)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="m", prompt="x" * 40_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="Hi")
    with (
        openai.OpenAI(base_url=polite_url, api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.chat.completions.create(model="m", messages=ASKED)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after_s=0.05), openai.RateLimitError),
        (EngineUnavailable("gone", retry_after_s=0.05), openai.InternalServerError),
    ],
)
def test_what_passes_is_tried_again(told: openai.OpenAI, scripted: Scripted, error: Any, kind: Any) -> None:
    scripted.engine.refusal = error
    with pytest.raises(kind):
        told.chat.completions.create(model="m", messages=ASKED)
    scripted.refuse(error, times=2)
    answer = told.with_options(max_retries=2).chat.completions.create(model="m", messages=ASKED)
    assert answer.choices[0].message.content == TEXT
    assert scripted.num_refused == 2


def test_a_failure_in_a_stream_is_raised(told: openai.OpenAI, scripted: Scripted) -> None:
    scripted.engine.pause_s, scripted.engine.fails_after = 0.02, 2
    scripted.engine.failure = RequestFailed("NaN in the logits")
    with told.chat.completions.create(model="m", messages=ASKED, stream=True) as stream:
        with pytest.raises(openai.APIError) as failure:
            list(stream)
        assert "NaN in the logits" in failure.value.message
    with told.responses.stream(model="m", input="Hi") as events:
        assert [event.type for event in events][-1] == "response.failed"


def test_a_wait_that_is_too_long_ends(told: openai.OpenAI, scripted: Scripted) -> None:
    scripted.engine.pause_s = 1.0
    with pytest.raises(openai.APITimeoutError):
        told.with_options(timeout=0.2).chat.completions.create(model="m", messages=ASKED)
