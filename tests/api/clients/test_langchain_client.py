"""`langchain-openai`, unchanged, under the standard suite of `langchain-tests`: chats, and the Responses API.

The suite leaves out by itself what the server does not take, as the flags say: images, files and audio. It leaves out
its timing of a stream as well, which needs recorded answers of a service. Every other case runs: on the model of
`polite`, or, where a model would have to choose or to copy, on answers that stand here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.clients.scripted import KEY, Scripted

pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: pip install -e '.[clients]'")
pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: pip install -e '.[clients]'")

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI, OpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
"""The library's own: of models inside its answers, and of pydantic's first version."""

CHOOSING = ("test_agent_loop", "test_json_mode", "test_unicode_tool_call_integration")
"""Cases that need more than the polite model: a call by its own choice, or words of the question in the answer."""


def call(name: str, **arguments: str) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


def choose(prompt: str) -> str:
    """What a model would say."""
    if "<tool_response>" in prompt:
        return "It is sunny."
    if "San Francisco" in prompt:
        return call("get_weather", location="San Francisco, CA")
    for name in ("你好啊集团", "こんにちは株式会社"):
        if name in prompt:
            return call("unicode_customer", customer_name=name, description="a company")
    assert "'punchline' keys" in prompt
    return '{"setup": "Why do cats sleep?", "punchline": "Why not?"}'


@pytest.fixture(scope="module")
def http(runner: asyncio.Runner) -> Iterator[dict[str, Any]]:
    """Connections that are closed at the end: those that the library makes by itself are not."""
    plain, async_ = openai.DefaultHttpxClient(), openai.DefaultAsyncHttpxClient()
    yield {"http_client": plain, "http_async_client": async_}
    plain.close()
    runner.run(async_.aclose())


@pytest.fixture
def benchmark() -> None:
    """Stands in for a plugin's: the case that times a stream asks for it before it leaves itself out."""


@pytest.fixture
def vcr() -> None:
    """As `benchmark`."""


class TestChats(ChatModelIntegrationTests):
    url: str
    http: dict[str, Any]
    more: dict[str, Any] = {}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _choose_server(self, request: pytest.FixtureRequest, polite_url: str, scripted: Scripted, http: Any) -> None:
        is_choosing = request.node.originalname in CHOOSING
        scripted.answer_by_prompt(choose)
        self.http = http
        self.url = f"{scripted.url}/v1" if is_choosing else polite_url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "m", "base_url": self.url, "api_key": KEY, "stream_usage": True, **self.http, **self.more}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "also-m"

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = self.chat_model_class(**self.chat_model_params)
        question = "The same words again. " * 20
        model.invoke(question)
        if not stream:
            return model.invoke(question)
        full: Any = None
        for chunk in model.stream(question):
            full = chunk if full is None else full + chunk
        assert full.usage_metadata["input_token_details"]["cache_read"] > 0
        found: AIMessage = full
        return found


class TestResponses(TestChats):
    more: dict[str, Any] = {"use_responses_api": True}  # noqa: RUF012

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}


def test_a_completion(polite_url: str, http: dict[str, Any]) -> None:
    model = OpenAI(model="m", base_url=polite_url, api_key=KEY, temperature=0, max_tokens=20, **http)
    assert model.invoke('say "') == "Okay."
    assert "".join(model.stream('say "')) == "Okay."
