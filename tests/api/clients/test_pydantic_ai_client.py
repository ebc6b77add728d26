"""`pydantic-ai`, unchanged: agents over chats, responses and Anthropic's messages, with tools and typed outputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.api.clients.polite import TEXT
from tests.api.clients.scripted import KEY, Scripted

pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed: pip install -e '.[clients]'")

from pydantic_ai import Agent, ModelHTTPError, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

KINDS = ("chat", "responses", "anthropic")


class Booking(BaseModel):
    """A table."""

    name: str
    guests: int
    size: Literal["small", "large"]


BOOKED = Booking(name=TEXT, guests=3, size="large")


Model = Callable[[str, str, str], Any]


@pytest.fixture(scope="module")
def model(runner: asyncio.Runner) -> Iterator[Model]:
    """Makes a model of the library, of a kind, for a URL that has /v1 and for a name; its connections are closed."""
    clients: list[Any] = []

    def make(kind: str, url: str, name: str) -> Any:
        if kind == "anthropic":
            clients.append(anthropic.AsyncAnthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0))
            return AnthropicModel(name, provider=AnthropicProvider(anthropic_client=clients[-1]))
        clients.append(openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0))
        provider = OpenAIProvider(openai_client=clients[-1])
        known = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
        return known(name, provider=provider)

    yield make
    for client in clients:
        runner.run(client.close())


@pytest.fixture(params=KINDS)
def polite(request: pytest.FixtureRequest, model: Model, polite_url: str) -> Any:
    return model(request.param, polite_url, "m")


@pytest.fixture(params=KINDS)
def told(request: pytest.FixtureRequest, model: Model, scripted: Scripted) -> Any:
    return model(request.param, f"{scripted.url}/v1", "m")


async def test_a_run_and_its_stream(polite: Any) -> None:
    agent = Agent(polite, instructions="Be brief.")
    whole = await agent.run("Hi")
    assert whole.output == TEXT
    assert whole.usage.output_tokens == len(TEXT) + 1
    more = await agent.run("And?", message_history=whole.all_messages())
    assert more.output == TEXT
    async with agent.run_stream("Hi") as stream:
        assert "".join([part async for part in stream.stream_text(delta=True)]) == TEXT


async def test_an_output_by_a_call(polite: Any) -> None:
    agent = Agent(polite, output_type=ToolOutput(Booking))
    assert (await agent.run("Book a table.")).output == BOOKED
    async with agent.run_stream("Book a table.") as stream:
        assert await stream.get_output() == BOOKED


async def test_an_output_by_a_schema(model: Model, polite_url: str) -> None:
    for kind in ("chat", "responses"):
        agent = Agent(model(kind, polite_url, "m"), output_type=NativeOutput(Booking))
        assert (await agent.run("Book a table.")).output == BOOKED


async def test_an_output_that_is_only_asked_for(told: Any, scripted: Scripted) -> None:
    scripted.answer_in_turn("I do not know.", BOOKED.model_dump_json())
    agent = Agent(told, output_type=PromptedOutput(Booking), retries=2)
    assert (await agent.run("Book a table.")).output == BOOKED


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_calls_its_tools(told: Any, scripted: Scripted, streams: bool) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    before = "" if streams else "I look.\n"  # a stream's first text is its output
    scripted.answer_in_turn(before + call, "It rains.")
    agent = Agent(told)
    asked: list[str] = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "rain"

    if streams:
        async with agent.run_stream("How is the weather?") as stream:
            output: Any = await stream.get_output()
    else:
        output = (await agent.run("How is the weather?")).output
    assert (output, asked) == ("It rains.", ["Köln"])
    assert "rain" in scripted.prompts()[1]


async def test_a_tool_that_fails_is_told(told: Any, scripted: Scripted) -> None:
    bad, good = (
        f'<tool_call>\n{{"name": "double", "arguments": {arguments}}}\n</tool_call>'
        for arguments in ('{"number": "many"}', '{"number": 2}')
    )
    scripted.answer_in_turn(bad, good, "Four.")
    agent = Agent(told)

    @agent.tool_plain
    def double(number: int) -> int:
        return 2 * number

    assert (await agent.run("Double two.")).output == "Four."
    assert "valid integer" in scripted.prompts()[1]


async def test_an_error_says_what_was_wrong(model: Model, polite_url: str) -> None:
    for kind in KINDS:
        with pytest.raises(ModelHTTPError) as failure:
            await Agent(model(kind, polite_url, "nope")).run("Hi")
        assert failure.value.status_code == 404
