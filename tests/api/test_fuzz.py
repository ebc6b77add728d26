"""Fuzzed bodies: whatever a client sends, it is answered, and never with a 5xx."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.documented import check_answer
from tests.api.house import House, chat_body, make_house


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("model"))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**40, 0.5, 1e308, -0.0, "", "m", "\x00", "<|end|>", "x" * 300]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
names = st.sampled_from([
    *("model", "messages", "prompt", "stream", "stream_options", "n", "stop", "stop_token_ids", "max_tokens"),
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "logit_bias", "seed", "logprobs", "top_logprobs"),
    *("speculative", "echo", "response_format", "tools", "metadata", "presence_penalty", "nonsense", "ignore_eos"),
    *("max_completion_tokens", "best_of", "add_special_tokens", "prediction", "cache_control", "parallel_tool_calls"),
    *("tool_choice", "chat_template_kwargs", "reasoning_effort", "include_reasoning", "separate_reasoning"),
])  # fmt: skip
part_names = st.sampled_from(["type", "text", "x", "cache_control"])
parts = st.dictionaries(part_names, st.sampled_from(["text", "thinking", "a", 1, None, {}, ["a"]]), max_size=3)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", 1, None])},
    optional={
        "content": st.one_of(values, st.lists(parts, max_size=3)),
        "name": values,
        "tool_calls": st.one_of(values, st.lists(st.dictionaries(st.sampled_from(["id", "type", "function"]), values))),
        "tool_call_id": values,
        "reasoning_content": values,
        "thinking": values,
    },
)


@settings(max_examples=250, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chat=st.booleans(),
    fields=st.dictionaries(names, values, max_size=5),
    messages=st.one_of(st.none(), st.lists(turns, max_size=3)),
)
def test_no_body_is_our_fault(house: House, chat: bool, fields: dict[str, Any], messages: Any) -> None:
    body = chat_body() if chat else {"model": "m", "prompt": "Hi", "max_tokens": 4}
    if messages is not None and chat:
        body["messages"] = messages
    response = house.post("/v1/chat/completions" if chat else "/v1/completions", {**body, **fields})
    assert response.status_code in (200, 400, 404), response.text
    check_answer(house, response)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.binary(max_size=60), st.text(alphabet='{}[]":,\\u0dD8e+-.NaInfity19 ', max_size=60).map(str.encode))
)
def test_no_bytes_are_our_fault(house: House, body: bytes) -> None:
    response = house.post("/v1/chat/completions", body)
    assert response.status_code == 400
    check_answer(house, response)
