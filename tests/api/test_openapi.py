"""/openapi.json tells the truth: every status, the shape of every answer, and who needs a key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.api.answer_schema import ChatCompletion
from server.api.door import OPEN_PATHS
from server.errors import EngineUnavailable, Overloaded, RequestFailed
from tests.api.documented import check_answer, operation
from tests.api.house import House, chat_body, make_house

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = {"Authorization": "Bearer k"}


@pytest.fixture(scope="module")
def shared_house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("model"), api_key=("k",), max_body_bytes=4096)


@pytest.fixture
def house(shared_house: House) -> House:
    engine = shared_house.engine
    engine.refusal = engine.fails_after = None
    engine.is_ready, engine.is_draining, engine.is_dead, engine.is_drafting = True, False, False, True
    return shared_house


PREDICTION = {"prediction": {"type": "content", "content": "Hello"}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
EACH = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize("more", [{}, {"stream": True}, USAGE, EACH])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "max_tokens": 3},
        {"logprobs": True, "top_logprobs": 2, "stop": ["w"]},
        {"speculative": {"metrics": True}, **PREDICTION},
    ],
)
def test_chat_answers_are_as_told(house: House, fields: dict[str, Any], more: dict[str, Any]) -> None:
    response = house.post(CHAT, chat_body(**fields, **more), headers=KEY)
    assert response.status_code == 200
    check_answer(house, response)


@pytest.mark.parametrize("more", [{}, {"stream": True}, USAGE, EACH])
@pytest.mark.parametrize(
    "fields", [{"n": 2}, {"logprobs": 2}, {"echo": True}, {"speculative": {"metrics": True}, "stop": "l"}]
)
def test_completions_are_as_told(house: House, fields: dict[str, Any], more: dict[str, Any]) -> None:
    response = house.post(TEXT, {"model": "m", "prompt": "Hi", **fields, **more}, headers=KEY)
    assert response.status_code == 200
    check_answer(house, response)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_errors_are_as_told(house: House, path: str) -> None:
    body = {**chat_body(), "max_tokens": 4} if path == CHAT else {"model": "m", "prompt": "Hi"}
    seen = set()

    def ask(fields: dict[str, Any], headers: dict[str, str]) -> None:
        response = house.post(path, {**body, **fields}, headers=headers)
        check_answer(house, response)
        seen.add(response.status_code)

    ask({}, {})
    ask({"n": 0}, KEY)
    ask({"model": "nope"}, KEY)
    ask({"user": "x" * 5000}, KEY)
    house.engine.fails_after, house.engine.failure = 1, RequestFailed("broken")
    ask({}, KEY)
    ask({"stream": True}, KEY)
    house.engine.pause_s = 0.03  # the failure comes when 200 has been said
    ask({"stream": True}, KEY)
    house.engine.pause_s = 0.0
    house.engine.refusal = Overloaded("full", retry_after_s=1)
    ask({}, KEY)
    house.engine.refusal = EngineUnavailable("gone", retry_after_s=1)
    ask({}, KEY)
    assert seen == {int(status) for status in operation(house, "POST", path)["responses"]}


def test_other_routes_are_as_told(house: House) -> None:
    def ask(path: str, **headers: str) -> int:
        response = house.get(path, headers=headers)
        check_answer(house, response)
        return response.status_code

    assert [ask(path) for path in sorted(OPEN_PATHS)] == [200] * 4
    assert [ask("/v1/models", **KEY), ask("/v1/models/org/name", **KEY)] == [200, 200]
    assert [ask("/v1/models/nope", **KEY), ask("/v1/models")] == [404, 401]
    info, house.engine.info = house.engine.info, None
    house.engine.is_ready = False
    assert [ask("/v1/models", **KEY), ask("/v1/models/m", **KEY), ask("/ready")] == [503, 503, 503]
    house.engine.info = info


def test_who_needs_a_key_is_told(house: House) -> None:
    document = house.get("/openapi.json", headers=KEY).json()
    schemes = document["components"]["securitySchemes"]
    assert [one.get("scheme") or one["name"] for one in schemes.values()] == ["bearer", "x-api-key"]
    either = [{name: []} for name in schemes]
    for path, methods in document["paths"].items():
        for told in methods.values():
            assert told.get("security") == (None if path in OPEN_PATHS else either), path
            assert ("401" in told["responses"]) == (path not in OPEN_PATHS), path


def test_every_reference_is_kept_and_what_is_left_out_is_never_null(house: House) -> None:
    document = house.get("/openapi.json", headers=KEY).json()
    schemas = document["components"]["schemas"]

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            here = {value["$ref"]} if "$ref" in value else set()
            return here.union(*(references(child) for child in value.values()))
        return set().union(*(references(child) for child in value)) if isinstance(value, list) else set()

    assert references(document) == {f"#/components/schemas/{name}" for name in schemas}
    usage = schemas["UsageInfo"]
    assert usage["properties"]["completion_tokens_details"].keys() == {"$ref", "title"}
    assert "completion_tokens_details" not in usage["required"]
    assert usage["additionalProperties"] is False


def test_a_field_that_is_not_told_would_be_noticed(house: House) -> None:
    answer = house.post(CHAT, chat_body(), headers=KEY).json()
    ChatCompletion.model_validate(answer)
    for broken in ({**answer, "more": 1}, {**answer, "created": "1"}, {**answer, "choices": None}):
        with pytest.raises(ValidationError):
            ChatCompletion.model_validate(broken)
