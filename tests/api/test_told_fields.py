"""Fields that change what an answer tells: token ids, special tokens, log-probabilities of the prompt, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.api.writer import PADDED_BYTES
from tests.api.documented import check_answer
from tests.api.fake_engine import FakeEngine
from tests.api.house import HELLO, House, chat_body, events, make_house
from tests.api.model_folder import END

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATHS = pytest.mark.parametrize("path", [CHAT, TEXT])
STREAMS = pytest.mark.parametrize("step", [1, 3, 100])
USER = END - 3


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


def ask(house: House, path: str, **fields: Any) -> Any:
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi", "max_tokens": 100}
    response = house.post(path, {**body, **fields})
    assert response.status_code == 200, response.text
    check_answer(house, response)
    return response


def whole(house: House, path: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = ask(house, path, **fields).json()
    return found


def chunks(house: House, path: str, **fields: Any) -> list[dict[str, Any]]:
    return list(events(ask(house, path, stream=True, **fields))[:-1])


def text_of(path: str, choice: dict[str, Any]) -> str:
    part = choice.get("message") or choice.get("delta") if path == CHAT else choice
    return str((part or {}).get("content" if path == CHAT else "text") or "")


def streamed_text(path: str, found: list[dict[str, Any]]) -> str:
    return "".join(text_of(path, chunk["choices"][0]) for chunk in found)


def refusal(house: House, path: str, **fields: Any) -> tuple[str, str]:
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi", "max_tokens": 9}
    before = len(house.engine.submits)
    response = house.post(path, {**body, **fields})
    assert response.status_code == 400, response.text
    assert len(house.engine.submits) == before
    return response.json()["error"]["param"], response.json()["error"]["message"]


@PATHS
@STREAMS
def test_token_ids(house: House, path: str, step: int) -> None:
    house.engine.step = step
    for fields, ids in (
        ({}, [*HELLO.encode(), END]),
        ({"max_tokens": 3}, [*b"Hel"]),
        ({"stop": "lo"}, [*b"Hello"]),
        ({"logprobs": True if path == CHAT else 1}, [*HELLO.encode(), END]),
    ):
        answer = whole(house, path, return_token_ids=True, **fields)
        prompt = list(house.engine.submits[-1].prompt)
        assert answer["choices"][0]["token_ids"] == ids
        assert (answer if path == CHAT else answer["choices"][0])["prompt_token_ids"] == prompt
        assert answer["usage"]["completion_tokens"] == len(ids)
        found = chunks(house, path, return_token_ids=True, **fields)
        assert [id_ for chunk in found for id_ in chunk["choices"][0].get("token_ids", [])] == ids
        told = [(chunk if path == CHAT else chunk["choices"][0]).get("prompt_token_ids") for chunk in found]
        assert told == [prompt] + [None] * (len(found) - 1)
        assert streamed_text(path, found) == text_of(path, answer["choices"][0])
        assert "token_ids" not in found[-1]["choices"][0]
    plain = whole(house, path)
    assert "token_ids" not in plain["choices"][0]


def test_token_ids_of_many_choices(house: House) -> None:
    answer = whole(house, TEXT, prompt=["a", "bc"], n=2, return_token_ids=True, max_tokens=2)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97], [97], [98, 99], [98, 99]]
    found = chunks(house, TEXT, prompt=["a", "bc"], n=2, return_token_ids=True, max_tokens=2)
    for index in range(4):
        mine = [chunk["choices"][0] for chunk in found if chunk["choices"][0]["index"] == index]
        assert [id_ for choice in mine for id_ in choice.get("token_ids", [])] == [*b"He"]
        assert mine[0]["prompt_token_ids"] == ([97] if index < 2 else [98, 99])


@PATHS
@STREAMS
def test_special_tokens_are_shown_on_wish(tmp_path: Path, path: str, step: int) -> None:
    house = make_house(tmp_path, FakeEngine(lambda submit: [*b"a", USER, *"é".encode(), END], step=step))
    for fields, text in (
        ({}, "aé"),
        ({"skip_special_tokens": True}, "aé"),
        ({"skip_special_tokens": False}, "a<|user|>é"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "a<|user|>é<|end|>"),
        ({"skip_special_tokens": False, "stop": "ser|>"}, "a<|u"),
        ({"skip_special_tokens": True, "stop": "<|user|>"}, "a"),
    ):
        assert text_of(path, whole(house, path, **fields)["choices"][0]) == text, fields
        assert streamed_text(path, chunks(house, path, **fields)) == text, fields


@PATHS
def test_tokens_named_by_their_ids(house: House, path: str) -> None:
    fields = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    answer = whole(house, path, return_tokens_as_token_ids=True, max_tokens=2, **fields)
    logprobs = answer["choices"][0]["logprobs"]
    if path == CHAT:
        assert [entry["token"] for entry in logprobs["content"]] == ["token_id:72", "token_id:101"]
        assert logprobs["content"][0]["top_logprobs"][0]["token"] == "token_id:72"
    else:
        assert logprobs["tokens"] == ["token_id:72", "token_id:101"]
        assert logprobs["top_logprobs"][0] == {"token_id:72": -0.25}


@PATHS
def test_logprobs_of_the_prompt(house: House, path: str) -> None:
    answer = whole(house, path, prompt_logprobs=2)
    submit = house.engine.submits[-1]
    assert submit.num_prompt_logprobs == 2
    told = (answer if path == CHAT else answer["choices"][0])["prompt_logprobs"]
    assert told[0] is None
    assert [list(entry) for entry in told[1:]] == [[str(id_), str(id_ + 1)] for id_ in submit.prompt[1:]]
    ranks = [[one["rank"] for one in entry.values()] for entry in told[1:]]
    assert ranks == [[2, 2]] * len(ranks), "the rank of the token itself is the worker's"
    assert refusal(house, path, prompt_logprobs=1, stream=True)[0] == "prompt_logprobs"
    assert "at most 20" in refusal(house, path, prompt_logprobs=21)[1]
    assert refusal(house, path, prompt_logprobs=-1)[0] == "prompt_logprobs"
    whole(house, path)
    assert house.engine.submits[-1].num_prompt_logprobs == -1


def test_fewer_logprobs_where_the_server_allows_fewer(tmp_path: Path) -> None:
    house = make_house(tmp_path, max_logprobs=3)
    param, message = refusal(house, CHAT, prompt_logprobs=4)
    assert param == "prompt_logprobs"
    assert "--max-logprobs" in message


@STREAMS
@pytest.mark.parametrize("prompt", ["Hé!", [72, 0xC3, 0xA9, 33]])
def test_an_echo_with_logprobs(house: House, step: int, prompt: Any) -> None:
    house.engine.step = step
    fields: dict[str, Any] = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2}
    answer = whole(house, TEXT, **fields)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "Hé!He"
    assert logprobs["tokens"] == ["H", "bytes:\\xc3", "bytes:\\xa9", "!", "H", "e"]
    assert logprobs["token_logprobs"] == [None, *[-0.25] * 5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"!": -0.25}
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert answer["usage"]["completion_tokens"] == 2
    found = [chunk["choices"][0] for chunk in chunks(house, TEXT, **fields)]
    assert "".join(one["text"] for one in found) == "Hé!He"
    ended = whole(house, TEXT, **{**fields, "max_tokens": 99})["choices"][0]["logprobs"]
    assert (ended["tokens"][-1], ended["text_offset"][-1]) == ("<|end|>", 3 + len(HELLO)), (
        "the stop token is scored too"
    )
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for one in found if one["logprobs"] for value in one["logprobs"][name]] == logprobs[name]


@pytest.mark.parametrize("step", [1, 100])
def test_a_prompt_scored_alone(house: House, step: int) -> None:
    """As lm-eval asks for log-likelihoods."""
    house.engine.step = step
    fields: dict[str, Any] = {"prompt": [[72, 105], [105]], "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = whole(house, TEXT, **fields)
    first, second = answer["choices"]
    assert (first["text"], second["text"]) == ("Hi", "i")
    assert first["logprobs"]["token_logprobs"] == [None, -0.25]
    assert second["logprobs"]["token_logprobs"] == [None]
    assert first["finish_reason"] == second["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    found = [chunk["choices"][0] for chunk in chunks(house, TEXT, **fields)]
    assert "".join(one["text"] for one in found if one["index"] == 0) == "Hi"
    plain = whole(house, TEXT, echo=True, max_tokens=0, return_token_ids=True)
    assert plain["choices"][0]["text"] == "Hi"
    assert plain["choices"][0]["token_ids"] == []
    assert plain["choices"][0]["logprobs"] is None
    scored = whole(house, TEXT, prompt_logprobs=0, max_completion_tokens=0, max_tokens=None)
    assert len(scored["choices"][0]["prompt_logprobs"]) == 2
    assert refusal(house, TEXT, max_tokens=0)[0] == "max_tokens"
    assert refusal(house, TEXT, max_completion_tokens=0, max_tokens=None)[0] == "max_completion_tokens"
    assert refusal(house, CHAT, max_tokens=0)[0] == "max_tokens"


@PATHS
def test_padded_chunks_have_sizes_that_tell_nothing(house: House, path: str) -> None:
    plain = chunks(house, path, seed=1)
    response = ask(house, path, stream=True, stream_options={"include_obfuscation": True}, seed=1)
    found = events(response)[:-1]
    assert all(chunk.pop("obfuscation") is not None for chunk in found)
    assert [chunk["choices"] for chunk in found] == [chunk["choices"] for chunk in plain]
    lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
    assert {(len(line.encode()) + 2) % PADDED_BYTES for line in lines} == {0}
    again = ask(house, path, stream=True, stream_options={"include_obfuscation": True}, seed=1)
    assert events(again)[1]["obfuscation"] != events(response)[1]["obfuscation"]
    for options in ({}, {"include_obfuscation": False}):
        assert all("obfuscation" not in chunk for chunk in chunks(house, path, stream_options=options))
    assert refusal(house, path, stream_options={"include_obfuscation": True})[0] == "stream_options"


def test_a_salt_parts_what_is_shared(tmp_path: Path) -> None:
    house = make_house(tmp_path, api_key=("k", "l"))

    def tenant(key: str, path: str = CHAT, **fields: Any) -> str:
        body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi"}
        response = house.post(path, {**body, **fields}, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 200, response.text
        return house.engine.submits[-1].tenant

    plain = tenant("k")
    assert tenant("k", cache_salt="") == tenant("k", cache_salt=None) == plain
    salted = tenant("k", cache_salt="a")
    assert salted == tenant("k", path=TEXT, cache_salt="a")
    assert len({plain, salted, tenant("k", cache_salt="b"), tenant("l"), tenant("l", cache_salt="a")}) == 5
    response = house.post(CHAT, chat_body(cache_salt="x" * 129), headers={"Authorization": "Bearer k"})
    assert "cache_salt" in response.json()["error"]["message"]


@PATHS
def test_only_the_end_of_a_prompt(house: House, path: str) -> None:
    def prompt(**fields: Any) -> bytes:
        whole(house, path, **fields)
        return bytes(token % 256 for token in house.engine.submits[-1].prompt)

    full = prompt()
    assert prompt(truncate_prompt_tokens=2) == full[-2:]
    assert prompt(truncate_prompt_tokens=1000) == full
    long = {"prompt": "x" * 5000 + "end"} if path == TEXT else {"messages": [{"role": "user", "content": "x" * 5000}]}
    assert len(prompt(truncate_prompt_tokens=-1, max_tokens=24, **long)) == 1000
    assert len(prompt(truncate_prompt_tokens=7, **long)) == 7
    if path == TEXT:
        assert prompt(truncate_prompt_tokens=3, **long) == b"end"
        assert prompt(truncate_prompt_tokens=2, prompt=[72, 73, 74]) == b"IJ"
        assert text_of(path, whole(house, path, truncate_prompt_tokens=1, echo=True)["choices"][0]) == "i" + HELLO
    for value in (0, -2, 1024):
        assert refusal(house, path, truncate_prompt_tokens=value)[0] == "truncate_prompt_tokens"


def test_a_prediction_for_a_completion(house: House) -> None:
    prediction = {"type": "content", "content": "Hello<|end|>"}
    answer = whole(house, TEXT, prompt=["a", "b"], prediction=prediction)
    assert [submit.prediction for submit in house.engine.submits] == [tuple(b"Hello<|end|>")] * 2
    details = answer["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 8, "rejected_prediction_tokens": 10}
    assert streamed_text(TEXT, chunks(house, TEXT, prediction=prediction)) == HELLO
    assert refusal(house, TEXT, prediction={"type": "content"})[0] == "prediction.content"


def test_how_a_conversation_ends(house: House) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]

    def prompt(**fields: Any) -> str:
        whole(house, CHAT, messages=turns, **fields)
        text = house.scribe.text
        return text.read_prompt(house.engine.submits[-1].prompt, text.special_names)

    closed = "<|bos|><|user|>Hi<|end|><|assistant|>Well, <|end|>"
    assert prompt() == prompt(add_generation_prompt=True) == closed + "<|assistant|>"
    assert prompt(add_generation_prompt=False) == prompt(add_generation_prompt=False, continue_final_message=False)
    assert prompt(add_generation_prompt=False) == closed
    assert prompt(continue_final_message=True) == closed.removesuffix("<|end|>")
    assert prompt(continue_final_message=True, add_generation_prompt=False) == closed.removesuffix("<|end|>")
    assert streamed_text(CHAT, chunks(house, CHAT, messages=turns, continue_final_message=True)) == HELLO
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal(house, CHAT, **both)[0] == "continue_final_message"


def test_special_text_in_a_message_that_is_continued_stays_text(house: House) -> None:
    turns = [{"role": "assistant", "content": "a<|end|>"}]
    whole(house, CHAT, messages=turns, continue_final_message=True)
    assert house.engine.submits[-1].prompt == (END - 4, END - 2, *b"a<|end|>")
