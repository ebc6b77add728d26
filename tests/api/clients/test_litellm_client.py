"""`litellm`, unchanged: its ways to an OpenAI server, to a vLLM server and to Anthropic's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.errors import Overloaded
from tests.api.clients.polite import TEXT
from tests.api.clients.scripted import KEY, Scripted
from tests.tool_templates import tool

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
"""The library's own, when it is imported and of models inside its answers."""

ASKED = [{"role": "user", "content": "Hi"}]
CALL = 'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


class Booking(BaseModel):
    name: str
    guests: int


@pytest.fixture(scope="module")
def litellm(runner: asyncio.Runner) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its prices are of no use here, and come from the network
        found = pytest.importorskip("litellm", reason="litellm is not installed: pip install -e '.[clients]'")
    yield found
    runner.run(found.close_litellm_async_clients())
    for client in [found.module_level_client, *found.in_memory_llm_clients_cache.cache_dict.values()]:
        if not inspect.iscoroutinefunction(close := getattr(client, "close", None)) and close is not None:
            close()


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(request: pytest.FixtureRequest, polite_url: str) -> dict[str, Any]:
    """How to ask the polite model."""
    return {"model": f"{request.param}/m", "api_base": polite_url, "api_key": KEY, "messages": ASKED, "num_retries": 0}


def test_a_chat_and_its_stream(litellm: Any, asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked, temperature=0, seed=1)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (TEXT, "stop")
    assert whole.usage.completion_tokens == len(TEXT) + 1
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == len(TEXT) + 1


async def test_an_async_chat(litellm: Any, asked: dict[str, Any]) -> None:
    whole = await litellm.acompletion(**asked)
    assert whole.choices[0].message.content == TEXT


def test_a_form(litellm: Any, asked: dict[str, Any]) -> None:
    whole = litellm.completion(**asked, response_format=Booking)
    assert Booking.model_validate_json(whole.choices[0].message.content) == Booking(name=TEXT, guests=3)


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_that_must_be(litellm: Any, asked: dict[str, Any], streams: bool) -> None:
    answer = litellm.completion(**asked, tools=[tool()], tool_choice="required", stream=streams)
    answer = litellm.stream_chunk_builder(list(answer)) if streams else answer
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", f'{{"city": "{TEXT}"}}')
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_call_by_choice_and_its_result(litellm: Any, scripted: Scripted) -> None:
    scripted.answer_in_turn(CALL, "It rains.")
    way = {"model": "openai/m", "api_base": f"{scripted.url}/v1", "api_key": KEY, "tools": [tool()]}
    first = litellm.completion(**way, messages=ASKED).choices[0].message
    (call,) = first.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "rain"}
    second = litellm.completion(**way, messages=[*ASKED, first, result])
    assert second.choices[0].message.content == "It rains."
    assert "Köln" in scripted.prompts()[1]


def test_a_completion(litellm: Any, polite_url: str) -> None:
    way = {"model": "text-completion-openai/m", "api_base": polite_url, "api_key": KEY, "max_tokens": 20}
    assert litellm.text_completion(**way, prompt='say "').choices[0].text == TEXT


@pytest.mark.parametrize("streams", [False, True])
def test_a_response(litellm: Any, polite_url: str, streams: bool) -> None:
    way = {"model": "openai/m", "api_base": polite_url, "api_key": KEY}
    answer = litellm.responses(**way, input="Hi", stream=streams)
    if streams:
        assert "".join(event.delta for event in answer if event.type == "response.output_text.delta") == TEXT
    else:
        assert answer.output[0].content[0].text == TEXT


@pytest.mark.parametrize("streams", [False, True])
def test_a_message_of_anthropic_s_kind(litellm: Any, polite_url: str, streams: bool) -> None:
    way = {"model": "anthropic/m", "api_base": polite_url.removesuffix("/v1"), "api_key": KEY, "max_tokens": 300}
    answer = litellm.completion(**way, messages=ASKED, tools=[tool()], tool_choice="required", stream=streams)
    answer = litellm.stream_chunk_builder(list(answer)) if streams else answer
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_errors_are_of_the_library_s_kinds(litellm: Any, asked: dict[str, Any], scripted: Scripted) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked, temperature=9)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**asked, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asked, "model": "openai/nope"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**asked, "messages": [{"role": "user", "content": "x" * 40_000}]})
    scripted.engine.refusal = Overloaded("full", retry_after_s=0.05)
    with pytest.raises(litellm.RateLimitError):
        litellm.completion(**{**asked, "api_base": f"{scripted.url}/v1"}, max_retries=0)
