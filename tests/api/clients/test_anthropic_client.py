"""The `anthropic` library, unchanged: messages, streams, tools, parsed answers, errors and retries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam
from pydantic import BaseModel

from server.errors import EngineUnavailable, Overloaded, RequestFailed
from tests.api.clients.polite import TEXT
from tests.api.clients.scripted import KEY, Scripted

ASKED: list[MessageParam] = [{"role": "user", "content": "Hi"}]
CALL = 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class Booking(BaseModel):
    name: str
    guests: int


@pytest.fixture
def client(polite_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=polite_url.removesuffix("/v1"), api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def told(scripted: Scripted) -> Iterator[anthropic.Anthropic]:
    """A client of the server whose answers the test writes."""
    with anthropic.Anthropic(base_url=scripted.url, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_message_and_its_stream(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="m", max_tokens=50, messages=ASKED, system="Be brief.")
    (block,) = whole.content
    assert block.type == "text"
    assert (block.text, whole.stop_reason, whole.usage.output_tokens) == (TEXT, "end_turn", len(TEXT) + 1)
    with client.messages.stream(model="m", max_tokens=50, messages=ASKED, system="Be brief.") as stream:
        assert "".join(stream.text_stream) == TEXT
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", len(TEXT) + 1)
    raw = client.messages.create(model="m", max_tokens=50, messages=ASKED, stream=True)
    assert [event.type for event in raw][-1] == "message_stop"
    assert client.messages.count_tokens(model="m", messages=ASKED).input_tokens > 0
    assert [model.id for model in client.models.list()] == ["m", "also-m"]


async def test_the_async_client(polite_url: str) -> None:
    url = polite_url.removesuffix("/v1")
    async with (
        anthropic.AsyncAnthropic(base_url=url, auth_token=KEY, max_retries=0) as client,
        client.messages.stream(model="m", max_tokens=50, messages=ASKED) as stream,
    ):
        assert "".join([part async for part in stream.text_stream]) == TEXT


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_that_must_be(client: anthropic.Anthropic, choice: Any) -> None:
    fields: Any = {"model": "m", "max_tokens": 500, "messages": ASKED, "tools": [WEATHER], "tool_choice": choice}
    whole = client.messages.create(**fields)
    (block,) = whole.content
    assert block.type == "tool_use"
    assert (block.name, block.input, whole.stop_reason) == ("get_weather", {"city": TEXT}, "tool_use")
    with client.messages.stream(**fields) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert "".join(pieces)
    assert final.content[0].input == {"city": TEXT}  # type: ignore[union-attr]


def test_an_answer_is_parsed_into_a_model(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(model="m", max_tokens=500, messages=ASKED, output_format=Booking)
    assert message.parsed_output == Booking(name=TEXT, guests=3)


@pytest.mark.parametrize("streams", [False, True])
def test_the_tool_runner_goes_on_until_nothing_is_called(
    told: anthropic.Anthropic, scripted: Scripted, streams: bool
) -> None:
    scripted.answer_in_turn(CALL, "It rains.")
    asked: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "rain"

    fields: Any = {"model": "m", "max_tokens": 500, "messages": ASKED, "tools": [get_weather], "stream": streams}
    runner = told.beta.messages.tool_runner(**fields)
    final = runner.until_done()
    assert final.content[-1].text == "It rains."
    assert asked == ["Köln"]
    assert "rain" in scripted.prompts()[1]


def test_errors_are_of_the_library_s_kinds(client: anthropic.Anthropic, polite_url: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(model="m", max_tokens=5, messages=ASKED, stop_sequences=[""])
    assert "stop_sequences[0]" in bad.value.message
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nope", max_tokens=5, messages=ASKED)
    with (
        anthropic.Anthropic(base_url=polite_url.removesuffix("/v1"), api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(model="m", max_tokens=5, messages=ASKED)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after_s=0.05), anthropic.RateLimitError),
        (EngineUnavailable("gone", retry_after_s=0.05), anthropic.InternalServerError),
    ],
)
def test_what_passes_is_tried_again(told: anthropic.Anthropic, scripted: Scripted, error: Any, kind: Any) -> None:
    scripted.engine.refusal = error
    with pytest.raises(kind):
        told.messages.create(model="m", max_tokens=50, messages=ASKED)
    scripted.refuse(error, times=2)
    message = told.with_options(max_retries=2).messages.create(model="m", max_tokens=50, messages=ASKED)
    assert message.stop_reason == "end_turn"
    assert scripted.num_refused == 2


def test_a_failure_in_a_stream_is_raised(told: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.engine.pause_s, scripted.engine.fails_after = 0.02, 2
    scripted.engine.failure = RequestFailed("NaN in the logits")
    with (
        pytest.raises(anthropic.APIStatusError) as failure,
        told.messages.stream(model="m", max_tokens=50, messages=ASKED) as stream,
    ):
        stream.until_done()
    assert "NaN in the logits" in failure.value.message
