"""`instructor`, unchanged: models out of calls, out of JSON that is asked for, out of a schema; tries, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.api.clients.polite import TEXT
from tests.api.clients.scripted import KEY, Scripted

instructor = pytest.importorskip("instructor", reason="instructor is not installed: pip install instructor")

ASKED: list[Any] = [{"role": "user", "content": "Book a table."}]


class Booking(BaseModel):
    """A table."""

    name: str
    guests: int = Field(gt=0)
    size: Literal["small", "large"]


BOOKED = Booking(name=TEXT, guests=3, size="large")


def is_booked(found: Any) -> bool:
    """Instructor makes a class of its own out of the model, which is equal to no other."""
    return isinstance(found, Booking) and found.model_dump() == BOOKED.model_dump()


@pytest.fixture
def client(polite_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=polite_url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def told(scripted: Scripted) -> Iterator[openai.OpenAI]:
    """A client of the server whose answers the test writes."""
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_the_server_binds_the_answer(client: openai.OpenAI, mode: str) -> None:
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    assert is_booked(patched.chat.completions.create(model="m", messages=ASKED, response_model=Booking, max_retries=0))
    booking, raw = patched.chat.completions.create_with_completion(model="m", messages=ASKED, response_model=Booking)
    assert is_booked(booking)
    assert raw.usage.completion_tokens > 10


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_model_grows_in_a_stream(client: openai.OpenAI, mode: str) -> None:
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    grown = list(patched.chat.completions.create_partial(model="m", messages=ASKED, response_model=Booking))
    assert len(grown) > 3
    assert is_booked(Booking.model_validate(grown[-1].model_dump()))


def test_several_models_in_a_stream(told: openai.OpenAI, scripted: Scripted) -> None:
    text = '{"name": "IterableBooking", "arguments": {"tasks": [' + ", ".join([BOOKED.model_dump_json()] * 2) + "]}}"
    scripted.answer(f"<tool_call>\n{text}\n</tool_call>")
    patched = instructor.from_openai(told, mode=instructor.Mode.TOOLS)
    found = list(patched.chat.completions.create_iterable(model="m", messages=ASKED, response_model=Booking))
    assert [is_booked(one) for one in found] == [True, True]


@pytest.mark.parametrize("mode", ["JSON", "MD_JSON"])
def test_json_that_does_not_fit_is_asked_for_again(told: openai.OpenAI, scripted: Scripted, mode: str) -> None:
    good = BOOKED.model_dump_json()
    texts = ['{"name": "x"}', good] if mode == "JSON" else ["I do not know.", f"```json\n{good}\n```"]
    scripted.answer_in_turn(*texts)
    patched = instructor.from_openai(told, mode=instructor.Mode[mode])
    assert is_booked(patched.chat.completions.create(model="m", messages=ASKED, response_model=Booking, max_retries=2))
    assert len(scripted.engine.submits) == 2
    assert (scripted.engine.submits[0].constraint is not None) == (mode == "JSON")


def test_arguments_that_do_not_fit_are_asked_for_again(told: openai.OpenAI, scripted: Scripted) -> None:
    calls = [
        f'<tool_call>\n{{"name": "Booking", "arguments": {arguments}}}\n</tool_call>'
        for arguments in ('{"name": "x", "guests": 0, "size": "small"}', BOOKED.model_dump_json())
    ]
    scripted.answer_in_turn(*calls)
    patched = instructor.from_openai(told, mode=instructor.Mode.TOOLS)
    assert is_booked(patched.chat.completions.create(model="m", messages=ASKED, response_model=Booking, max_retries=2))
    assert "greater than 0" in scripted.prompts()[1]


def test_responses(client: openai.OpenAI) -> None:
    patched = instructor.from_openai(client, mode=instructor.Mode.RESPONSES_TOOLS)
    assert is_booked(patched.responses.create(model="m", input=ASKED, response_model=Booking, max_retries=0))
