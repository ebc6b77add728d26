"""POST /v1/chat/completions: shapes of answers, streamed and not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.api.fake_engine import FakeEngine, ready
from tests.api.house import HELLO, House, events, make_house, run, say
from tests.api.model_folder import END


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


def official(house: House) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(house.app)
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://test/v1", http_client=httpx2.AsyncClient(transport=transport), max_retries=0
    )


def test_answer_in_one_piece(house: House) -> None:
    response = house.chat()
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": HELLO, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_answer = len(HELLO.encode()) + 1
    num_prompt = 4 + len("Hi")
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_prompt_is_the_rendered_template(house: House) -> None:
    house.chat()
    assert house.engine.submits[0].prompt == (256, 257, *b"Hi", END, 258)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_stream(house: House, step: int) -> None:
    house.engine.step = step
    response = house.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == HELLO
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "�" not in response.text


def test_stream_with_usage(house: House) -> None:
    *chunks, usage, _ = events(house.chat(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(HELLO.encode()) + 1


def test_continuous_usage(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(house.chat(stream=True, stream_options=options))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0 or counts == sorted(counts)
    assert counts[-1] == len(HELLO.encode()) + 1


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2},
        {"logprobs": True, "top_logprobs": 1},
        {"n": 2, "logprobs": True, "stop": "wör"},
        {"stop": "wör", "include_stop_str_in_output": True},
        {"max_tokens": 9},  # ends inside a character
        {"logprobs": True, "max_tokens": 9},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "logprobs": True},
    ],
)
def test_the_reason_comes_behind_all_text(house: House, step: int, fields: dict[str, Any]) -> None:
    house.engine.step = step
    whole = house.chat(**{name: value for name, value in fields.items() if name != "stream_options"}).json()
    chunks = [chunk for chunk in events(house.chat(stream=True, **fields))[:-1] if chunk["choices"]]
    for answer in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == answer["index"]]
        role, *texts, last = mine
        assert role["delta"] == {"role": "assistant", "content": ""}
        assert last == {
            "index": answer["index"],
            "delta": {},
            "logprobs": None,
            "finish_reason": answer["finish_reason"],
        }
        assert all(choice["finish_reason"] is None for choice in texts)
        assert all(choice["delta"] or choice["logprobs"]["content"] for choice in texts)
        assert "".join(choice["delta"].get("content", "") for choice in texts) == answer["message"]["content"]
        found = [entry for choice in texts if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert found == (answer["logprobs"] or {"content": []})["content"]


def test_an_answer_without_text_is_role_and_reason(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(lambda submit: [END]))
    for fields in ({}, {"logprobs": True}):
        _, last, _ = events(house.chat(stream=True, **fields))
        assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


def test_usage_of_a_chunk_counts_up_to_it(house: House) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(house.chat(stream=True, logprobs=True, n=2, stream_options=options))[:-1]
    num_sent = 0
    for chunk in chunks:
        for choice in chunk["choices"]:
            num_sent += len((choice["logprobs"] or {"content": []})["content"])
            num_sent += choice["finish_reason"] is not None  # the token that ended it is not shown
        assert chunk["usage"]["completion_tokens"] == num_sent
        assert chunk["usage"]["total_tokens"] == num_sent + chunk["usage"]["prompt_tokens"]
    assert num_sent == 2 * (len(HELLO.encode()) + 1)


def test_official_client_gathers_a_stream(house: House) -> None:
    async def gather() -> Any:
        manager = official(house).chat.completions.stream(
            model="m", messages=[{"role": "user", "content": "Hi"}], logprobs=True, n=2
        )
        async with manager as stream:
            return await stream.get_final_completion()

    house.engine.step = 2
    for choice in run(gather()).choices:
        assert choice.message.content == HELLO
        assert choice.finish_reason == "stop"
        assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes) == HELLO.encode()


def test_official_client_streams(house: House) -> None:
    async def talk() -> tuple[str, Any]:
        client = official(house)
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
        return text, usage

    text, usage = run(talk())
    assert text == HELLO
    assert usage.completion_tokens == len(HELLO.encode()) + 1


def test_official_client_reads_errors(house: House) -> None:
    async def ask() -> None:
        await official(house).chat.completions.create(model="nope", messages=[{"role": "user", "content": "Hi"}])

    with pytest.raises(openai.NotFoundError) as failure:
        run(ask())
    assert failure.value.code == "model_not_found"
    assert failure.value.param == "model"


def test_several_choices(tmp_path: Path) -> None:
    texts = {0: "first", 1: "second", 2: "third"}
    engine = FakeEngine(lambda submit: [*texts[int(submit.id.rsplit("-", 1)[1])].encode(), END])
    house = make_house(tmp_path, engine)
    body = house.chat(n=3, seed=7).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["first", "second", "third"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    seeds = [submit.sampling.seed for submit in engine.submits]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert body["usage"]["completion_tokens"] == sum(len(text) + 1 for text in texts.values())
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    chunks = events(house.chat(n=3, seed=7, stream=True))[:-1]
    for index, text in texts.items():
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == text
    assert [submit.sampling.seed for submit in engine.submits[3:]] == seeds


def test_stop_string_across_tokens(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("one two STOP three")))
    body = house.chat(stop=["STOP"]).json()
    assert body["choices"][0]["message"]["content"] == "one two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("one two STOP")
    assert house.engine.aborted
    kept = house.chat(stop="STOP", include_stop_str_in_output=True).json()
    assert kept["choices"][0]["message"]["content"] == "one two STOP"
    streamed = events(house.chat(stop="STOP", stream=True))[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed) == "one two "
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_logprobs(house: House) -> None:
    content = house.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == len(HELLO.encode())
    assert content[0] == {
        "token": "H",
        "logprob": -0.25,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.25, "bytes": [72]},
            {"token": "I", "logprob": -1.25, "bytes": [73]},
        ],
    }
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == HELLO
    chunks = events(house.chat(logprobs=True, stream=True))[1:-1]
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]


def test_speculation_metrics(house: House) -> None:
    expected = {
        "mean_acceptance_length": 2.5,
        "draft_acceptance_rate": 0.3,
        "acceptance_histogram": [1, 1, 1, 1],
        "num_spec_steps": 4,
        "num_accepted_draft_tokens": 6,
        "num_draft_tokens": 20,
        "num_spec_tokens": 7,
    }
    wish = {"metrics": True, "max_nodes": 8, "drafter": "trigram"}
    assert house.chat(speculative=wish).json()["metrics"] == {"speculative_decoding": expected}
    *chunks, last, _ = events(house.chat(speculative=wish, stream=True))
    assert last["metrics"] == {"speculative_decoding": expected}
    assert last["choices"][0]["finish_reason"] == "stop"
    *chunks, last, _ = events(house.chat(speculative=wish, stream=True, stream_options={"include_usage": True}))
    assert last["metrics"] == {"speculative_decoding": expected}
    assert last["choices"] == []
    assert all("metrics" not in chunk for chunk in chunks)
    assert "metrics" not in house.chat().json()
    cut = house.chat(speculative=wish, stop="llo").json()
    assert cut["choices"][0]["message"]["content"] == "He"
    assert cut["metrics"] == {"speculative_decoding": expected}


def test_speculation_is_chosen_per_request(house: House) -> None:
    house.chat()
    house.chat(speculative={"enabled": False})
    house.chat(speculative={"drafter": "none", "max_nodes": 3})
    chosen = [(submit.speculation.drafter, submit.speculation.max_nodes) for submit in house.engine.submits]
    assert chosen == [("hybrid", 16), ("none", 1), ("none", 1)]


PREDICTION = {"type": "content", "content": "Hello <|end|>"}
DETAILS = {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 5}


def test_a_prediction_goes_to_the_worker_and_its_counts_come_back(house: House) -> None:
    plain = house.chat(max_tokens=4, seed=1).json()
    assert "completion_tokens_details" not in plain["usage"]
    answer = house.chat(prediction=PREDICTION, max_tokens=4, seed=1).json()
    assert answer["usage"].pop("completion_tokens_details") == DETAILS
    assert answer["usage"] == plain["usage"]
    assert answer["choices"] == plain["choices"]
    assert "metrics" not in answer
    first, second = house.engine.submits
    assert (first.prediction, second.prediction) == ((), tuple(b"Hello <|end|>"))
    assert (first.prompt, first.sampling) == (second.prompt, second.sampling)


def test_parts_of_a_prediction_are_one_text(house: House) -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert house.chat(prediction={"type": "content", "content": parts}).status_code == 200
    assert bytes(house.engine.submits[0].prediction) == b"Hello"


def test_an_empty_prediction_is_one(house: House) -> None:
    answer = house.chat(prediction={"type": "content", "content": ""}).json()
    assert "completion_tokens_details" in answer["usage"]
    assert house.engine.submits[0].prediction == ()


def test_prediction_counts_in_a_stream_and_of_several_choices(house: House) -> None:
    wish = {"prediction": PREDICTION, "stream": True, "stream_options": {"include_usage": True}}
    *_, usage, _ = events(house.chat(**wish))
    assert usage["usage"]["completion_tokens_details"] == DETAILS
    *_, usage, _ = events(house.chat(n=3, **wish))
    assert usage["usage"]["completion_tokens_details"] == {name: 3 * count for name, count in DETAILS.items()}
    # A stop string ends the text before the worker knows.
    *_, usage, _ = events(house.chat(stop="wö", **wish))
    assert usage["usage"]["completion_tokens_details"] == DETAILS


def test_a_prediction_ends_where_the_model_could_not_say_it(tmp_path: Path) -> None:
    engine = FakeEngine(say("a"), info=ready(vocab_size=110))
    house = make_house(tmp_path, engine, model={"template": "{{ messages[0]['content'] }}"})
    assert house.chat(prediction={"type": "content", "content": "abcxyz"}).status_code == 200
    assert bytes(engine.submits[0].prediction) == b"abc"
