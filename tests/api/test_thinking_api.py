"""Thinking in chat completions: apart from the content, streamed or not, and what a request can say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.api.documented import check_answer
from tests.api.fake_engine import FakeEngine
from tests.api.house import House, make_house, say
from tests.api.test_tools_api import PARIS, pairs, streamed
from tests.tool_templates import HERMES, OPENS_THINKING, THINKING, tool

ANSWER = "<think>\nThe user greets.\n</think>\n\nHello!"


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path, FakeEngine(say(ANSWER)), {"template": THINKING})


def message(house: House, **fields: Any) -> dict[str, Any]:
    """The message of an answer, after a look at the streamed one, which has to be the same."""
    response = house.chat(**fields)
    check_answer(house, response)
    found: dict[str, Any] = response.json()["choices"][0]["message"]
    parts = streamed(house, **fields)[0][0]
    for key in ("content", "reasoning_content"):
        assert found.get(key) == parts.get(key)
    assert pairs(found) == pairs(parts)
    return found


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_thinking_is_apart(house: House, step: int) -> None:
    house.engine.step = step
    found = message(house)
    assert (found["reasoning_content"], found["content"]) == ("The user greets.", "Hello!")


def test_thinking_that_does_not_end_leaves_no_content(house: House) -> None:
    found = message(house, max_tokens=20)
    assert (found["reasoning_content"], found["content"]) == ("The user gre", None)


def test_thinking_can_be_left_out_or_left_in(house: House) -> None:
    hidden = message(house, include_reasoning=False)
    assert "reasoning_content" not in hidden
    assert hidden["content"] == "Hello!"
    assert message(house, separate_reasoning=False)["content"] == ANSWER
    assert message(house, separate_reasoning=True, include_reasoning=True) == message(house)


def test_a_prompt_that_opens_the_thinking(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say(ANSWER.removeprefix("<think>\n"))), {"template": OPENS_THINKING})
    found = message(house)
    assert (found["reasoning_content"], found["content"]) == ("The user greets.", "Hello!")


def test_a_model_that_does_not_think_says_all(tmp_path: Path) -> None:
    assert message(make_house(tmp_path, FakeEngine(say(ANSWER))))["content"] == ANSWER


def test_marks_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("")), {"template": THINKING, "more": ("<think>", "</think>")})
    ids = [house.scribe.text.added_token(mark) for mark in ("<think>", "</think>")]
    assert None not in ids
    house.engine.script = lambda _: [ids[0], *b"Hm.", ids[1], *b"Yes."]  # type: ignore[list-item]
    found = message(house)
    assert (found["reasoning_content"], found["content"]) == ("Hm.", "Yes.")
    assert message(house, separate_reasoning=False)["content"] == "Hm.Yes."


def test_a_request_switches_thinking_off(house: House) -> None:
    house.chat(chat_template_kwargs={"enable_thinking": False})
    house.chat(reasoning_effort="none")
    first, second = (submit.prompt for submit in house.engine.submits)
    assert first == second
    assert bytes(token for token in first if token < 256).endswith(b"<think>\n\n</think>\n\n")
    assert house.chat(reasoning_effort="low").status_code == 200


def test_calls_come_after_the_thinking_and_may_be_forced(tmp_path: Path) -> None:
    text = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
    template = HERMES.replace("{% if add_generation_prompt %}<|assistant|>", "<|assistant|><think>\n{% if false %}")
    house = make_house(tmp_path, FakeEngine(say(f"Look: {text}\n</think>\n\n{text}")), {"template": template})
    found = message(house, tools=[tool()], tool_choice="required")
    assert found["reasoning_content"] == f"Look: {text}"
    assert found["content"] is None
    assert pairs(found) == [("get_weather", PARIS)]
    constraint = house.engine.submits[-1].constraint
    assert constraint is not None
    assert "start: thoughts call" in constraint.grammar


def test_earlier_thinking_goes_back_to_templates_that_read_it(house: House) -> None:
    answer = house.chat().json()["choices"][0]["message"]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", **answer}, {"role": "user", "content": "Bye"}]
    assert house.chat(messages=turns).status_code == 200
    prompt = bytes(token for token in house.engine.submits[-1].prompt if token < 256)
    assert b"<think>\nThe user greets.\n</think>\n\nHello!" in prompt


def test_a_form_comes_after_the_thinking(tmp_path: Path) -> None:
    text = 'Yes or no?\n</think>\n\n{"a": 1}'
    house = make_house(tmp_path, FakeEngine(say(text)), {"template": OPENS_THINKING})
    found = message(house, response_format={"type": "json_object"})
    assert (found["reasoning_content"], found["content"]) == ("Yes or no?", '{"a": 1}')
    constraint = house.engine.submits[-1].constraint
    assert constraint is not None
    assert "start: thoughts @form" in constraint.grammar
