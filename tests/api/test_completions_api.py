"""POST /v1/completions: prompts of every form, echo, logprobs, streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.api.fake_engine import FakeEngine
from tests.api.house import HELLO, House, events, make_house, run, say
from tests.api.model_folder import END


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


def test_answer_in_one_piece(house: House) -> None:
    body = house.complete(max_tokens=100).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": HELLO, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["prompt_tokens"] == 2


def test_sixteen_tokens_by_default(house: House) -> None:
    body = house.post("/v1/completions", {"model": "m", "prompt": "Hi"}).json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["text"] == HELLO.encode()[:16].decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [tuple(b"Hi")]),
        (["Hi", "you"], [tuple(b"Hi"), tuple(b"you")]),
        ([72, 105], [(72, 105)]),
        ([[72], [105, 299]], [(72,), (105, 299)]),
    ],
)
def test_prompt_forms(house: House, prompt: object, expected: list[tuple[int, ...]]) -> None:
    body = house.complete(prompt=prompt).json()
    assert sorted(submit.prompt for submit in house.engine.submits) == sorted(expected)
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_prompts_times_choices(tmp_path: Path) -> None:
    engine = FakeEngine(lambda submit: [*bytes(submit.prompt), *submit.id.rsplit("-", 1)[1].encode(), END])
    house = make_house(tmp_path, engine)
    body = house.complete(prompt=["a", "b"], n=2, seed=5).json()
    assert [choice["text"] for choice in body["choices"]] == ["a0", "a1", "b2", "b3"]
    seeds = [submit.sampling.seed for submit in engine.submits]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] == 5


def test_echo(house: House) -> None:
    assert house.complete(echo=True).json()["choices"][0]["text"] == "Hi" + HELLO
    assert house.complete(echo=True, prompt=[72, 105, 256]).json()["choices"][0]["text"] == "Hi" + HELLO
    chunks = events(house.complete(echo=True, stream=True, prompt=["Hi", "Ho"]))[:-1]
    for index, prompt in enumerate(("Hi", "Ho")):
        texts = [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(texts) == prompt + HELLO


def test_an_answer_ends_the_character_that_its_prompt_began(tmp_path: Path) -> None:
    face = [*"🙂".encode()]
    house = make_house(tmp_path, FakeEngine(lambda submit: [*face[2:], *b"!", END]))
    for prompt, echoed in ((face[:2], ""), ([*b"a", *face, *face[:2]], "a🙂")):
        assert house.complete(prompt=prompt).json()["choices"][0]["text"] == "🙂!"
        assert house.complete(prompt=prompt, echo=True).json()["choices"][0]["text"] == echoed + "🙂!"
        chunks = events(house.complete(prompt=prompt, echo=True, stream=True))[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == echoed + "🙂!"


def test_a_stop_string_of_a_special_token(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(lambda submit: [*b"Hi", END - 3, *b"\nYou", END]))
    for stop, num_tokens in (("<|user|>", 3), ("<|user|>\n", 4)):
        body = house.complete(stop=[stop], max_tokens=9).json()
        assert body["choices"][0]["text"] == "Hi"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == num_tokens


def test_alternatives_that_read_alike_keep_their_keys(tmp_path: Path) -> None:
    """A fake engine names the next ids as alternatives: here further parts of characters."""
    house = make_house(tmp_path, FakeEngine(lambda submit: [0x80, END]))
    logprobs = house.complete(logprobs=5).json()["choices"][0]["logprobs"]
    assert len(logprobs["top_logprobs"][0]) >= 5


@pytest.mark.parametrize("step", [1, 100])
@pytest.mark.parametrize("fields", [{}, {"logprobs": 1, "max_tokens": 9}, {"n": 2, "stop": "wör"}, {"echo": True}])
def test_the_reason_comes_behind_all_text(house: House, step: int, fields: dict[str, Any]) -> None:
    house.engine.step = step
    whole = house.complete(prompt=["a", "b"], **fields).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in events(house.complete(prompt=["a", "b"], stream=True, **fields))[:-1]]
    for answer in whole:
        *texts, last = [choice for choice in chunks if choice["index"] == answer["index"]]
        reason = answer["finish_reason"]
        assert last == {"index": answer["index"], "text": "", "logprobs": None, "finish_reason": reason}
        assert all(choice["finish_reason"] is None for choice in texts)
        assert all(choice["text"] or choice["logprobs"]["tokens"] for choice in texts)
        assert "".join(choice["text"] for choice in texts) == answer["text"]
        found = [name for choice in texts if choice["logprobs"] for name in choice["logprobs"]["tokens"]]
        assert found == (answer["logprobs"] or {"tokens": []})["tokens"]


def test_logprobs(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("aé")))
    logprobs = house.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["token_logprobs"] == [-0.25] * 3
    assert logprobs["text_offset"] == [0, 1, 1]
    assert logprobs["top_logprobs"][0] == {"a": -0.25, "b": -1.25}
    assert house.engine.submits[0].sampling.num_logprobs == 2
    none = house.complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert none["top_logprobs"][0] == {"a": -0.25}


def test_official_client(house: House) -> None:
    async def ask() -> str:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(house.app))
        client = openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http, max_retries=0)
        stream = await client.completions.create(model="m", prompt="Hi", max_tokens=50, stream=True, logprobs=1)
        return "".join([chunk.choices[0].text async for chunk in stream])

    assert run(ask()) == HELLO


def test_sampling_fields_arrive(house: House) -> None:
    house.complete(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.1,
        logit_bias={"5": 2, "3": -100},
        min_tokens=4,
        max_tokens=9,
        stop_token_ids=[7],
        seed=-1,
    )
    sampling = house.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1.5, 1.1)
    assert sampling.logit_bias == ((3, -100), (5, 2))
    assert (sampling.min_tokens, sampling.max_tokens, sampling.stop_ids) == (4, 9, (END, 7))
    assert sampling.seed == 2**63 - 1
    assert sampling.num_logprobs == -1


def test_ignore_eos(house: House) -> None:
    house.complete(ignore_eos=True, stop_token_ids=[9])
    assert house.engine.submits[0].sampling.stop_ids == (9,)


def test_stop_token_text_is_kept_on_wish(house: House) -> None:
    comma = ord(",")
    assert house.complete(stop_token_ids=[comma]).json()["choices"][0]["text"] == "Hello"
    kept = house.complete(stop_token_ids=[comma], include_stop_str_in_output=True).json()
    assert kept["choices"][0]["text"] == "Hello,"
    assert kept["usage"]["completion_tokens"] == 6


def test_defaults_of_the_model(tmp_path: Path) -> None:
    generation = {"temperature": 0.3, "top_p": 0.8, "top_k": 11, "repetition_penalty": 1.2, "eos_token_id": [9]}
    house = make_house(tmp_path, model={"generation": generation})
    house.complete()
    house.complete(temperature=1, top_k=0)
    first, second = (submit.sampling for submit in house.engine.submits)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.3, 0.8, 11, 1.2)
    assert (second.temperature, second.top_k) == (1, 0)
    assert first.stop_ids == (9, END)


def test_answer_fills_the_context_by_default_in_chat(house: House) -> None:
    house.chat()
    house.chat(max_tokens=5)
    house.chat(max_completion_tokens=6)
    assert [submit.sampling.max_tokens for submit in house.engine.submits] == [1024 - 6, 5, 6]


def test_the_models_own_limit_is_a_default_for_chats(tmp_path: Path) -> None:
    house = make_house(tmp_path, model={"generation": {"max_new_tokens": 8}})
    house.chat()
    house.chat(max_tokens=20)
    house.chat(min_tokens=12)
    house.post("/v1/completions", {"model": "m", "prompt": "Hi"})
    assert [submit.sampling.max_tokens for submit in house.engine.submits] == [8, 20, 12, 16]
    longer = make_house(tmp_path / "longer", model={"generation": {"max_new_tokens": 4096}})
    longer.chat()
    assert longer.engine.submits[0].sampling.max_tokens == 1024 - 6, "a default is cut to the context"


def test_seeds(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        house = make_house(tmp_path / name, seed=42)
        house.complete()
        house.complete()
        drawn.append([submit.sampling.seed for submit in house.engine.submits])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    house = make_house(tmp_path / "c")
    house.complete()
    assert house.engine.submits[0].sampling.seed not in drawn[0]
