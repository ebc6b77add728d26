"""POST /tokenize, /detokenize, /v1/chat/completions/render; routes that are not here; CORS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.api.absent import ABSENT
from server.config import Settings, SettingsError, load
from tests.api.documented import check_answer
from tests.api.house import House, chat_body, make_house
from tests.api.model_folder import END, FIRST_SPECIAL

RENDER = "/v1/chat/completions/render"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "We"}]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path, model={"adds_bos": True})


def ask(house: House, path: str, **fields: Any) -> Any:
    response = house.post(path, fields)
    assert response.status_code == 200, response.text
    check_answer(house, response)
    return response.json()


def refusal(house: House, path: str, status: int = 400, **fields: Any) -> str:
    response = house.post(path, fields)
    assert response.status_code == status, response.text
    check_answer(house, response)
    return str(response.json()["error"]["param"])


def test_a_text_and_its_tokens(house: House) -> None:
    answer = ask(house, "/tokenize", prompt="Hé")
    ids = [FIRST_SPECIAL, *"Hé".encode()]
    assert answer == {"count": 4, "max_model_len": 1024, "tokens": ids}
    assert ask(house, "/tokenize", model="m", prompt="Hé", add_special_tokens=False)["tokens"] == ids[1:]
    strings = ask(house, "/tokenize", prompt="H<|end|>", return_token_strs=True)
    assert strings["tokens"] == [FIRST_SPECIAL, 72, END]
    assert strings["token_strs"] == ["<|bos|>", "H", "<|end|>"]
    assert ask(house, "/tokenize", prompt="", add_special_tokens=False)["count"] == 0
    assert ask(house, "/tokenize", prompt="x" * 5000)["count"] == 5001, "longer than the context"
    assert ask(house, "/detokenize", tokens=ids)["prompt"] == "<|bos|>Hé"
    assert ask(house, "/detokenize", tokens=[])["prompt"] == ""
    assert ask(house, "/detokenize", tokens=[72, 0xC3])["prompt"] == "H\ufffd"
    assert ask(house, "/detokenize", model="m", tokens=[97] * 10000)["prompt"] == "a" * 10000
    assert not house.engine.submits


def test_a_conversation_and_its_tokens(house: House) -> None:
    for fields in (
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ):
        tokens = ask(house, "/tokenize", messages=TURNS, **fields)["tokens"]
        rendered = ask(house, RENDER, model="m", messages=TURNS, **fields)
        assert rendered["token_ids"] == tokens
        assert rendered["prompt"] == ask(house, "/detokenize", tokens=tokens)["prompt"]
        house.chat(messages=TURNS, **fields)
        assert list(house.engine.submits[-1].prompt) == tokens, "what a chat is answered from"
    assert rendered["prompt"] == "<|bos|><|user|>Hi<|end|><|assistant|>We"
    assert ask(house, RENDER, model="m", messages=TURNS, truncate_prompt_tokens=2)["prompt"] == "<|end|><|assistant|>"


def test_what_is_refused(house: House) -> None:
    assert refusal(house, "/tokenize") == "prompt"
    assert refusal(house, "/tokenize", prompt="x", messages=TURNS) == "prompt"
    assert refusal(house, "/tokenize", prompt="x", continue_final_message=True) == "continue_final_message"
    assert refusal(house, "/tokenize", prompt=["x"]) == "prompt"
    assert refusal(house, "/tokenize", prompt="x", more=1) == "more"
    assert refusal(house, "/tokenize", messages=TURNS, add_special_tokens=True) == "add_special_tokens"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal(house, "/tokenize", messages=TURNS, **both) == "continue_final_message"
    assert refusal(house, "/tokenize", 404, prompt="x", model="nope") == "model"
    assert refusal(house, "/detokenize") == "tokens"
    assert refusal(house, "/detokenize", tokens="x") == "tokens"
    assert refusal(house, "/detokenize", tokens=[300]) == "tokens"
    assert refusal(house, "/detokenize", tokens=[-1]) == "tokens[0]"
    assert refusal(house, "/detokenize", tokens=[1] * (2**20 + 1)) == "tokens"
    assert refusal(house, RENDER, model="m", messages=TURNS, temperature=3) == "temperature"
    assert refusal(house, RENDER, 404, **{**chat_body(), "model": "nope"}) == "model"
    house.engine.is_ready = False
    assert refusal(house, "/tokenize", 503, prompt="x") == "None"


def test_they_ask_for_a_key(tmp_path: Path) -> None:
    house = make_house(tmp_path, api_key=("k",))
    for path in ("/tokenize", "/detokenize", RENDER, "/v1/embeddings"):
        assert house.post(path, {}).status_code == 401


@pytest.mark.parametrize("path", [*ABSENT, "/v1/audio/speech", "/v1/fine_tuning/jobs", "/v1/files/abc"])
def test_known_routes_that_are_not_here(house: House, path: str) -> None:
    for response in (house.post(path, {"model": "m"}), house.get(path)):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("not_found", "invalid_request_error")
        assert "This server generates text" in error["message"]


def test_a_mistyped_route_is_told_apart(house: House) -> None:
    assert house.post("/v1/embeddingz", {}).json()["error"]["message"] == "There is no route POST /v1/embeddingz."


# ---- CORS

PAGE = "https://app.example.org"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def preflight(house: House, origin: str = PAGE) -> Any:
    async def send() -> Any:
        async with house.client() as client:
            return await client.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})

    from tests.api.house import run

    return run(send())


@pytest.mark.parametrize(("origins", "told"), [((PAGE, "http://localhost:3000"), PAGE), (("*",), "*")])
def test_an_allowed_origin(tmp_path: Path, origins: tuple[str, ...], told: str) -> None:
    house = make_house(tmp_path, api_key=("k",), allowed_origins=origins)
    answer = preflight(house)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == told
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]
    key = {"Authorization": "Bearer k", "Origin": PAGE}
    found = house.post("/v1/chat/completions", chat_body(), headers=key)
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, told)
    assert "X-Request-Id" in found.headers["access-control-expose-headers"]
    refused = house.post("/v1/chat/completions", chat_body(), headers={"Origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, told), "it can be read"
    same = house.post("/v1/chat/completions", chat_body(), headers={"Authorization": "Bearer k"})
    assert "access-control-allow-origin" not in same.headers


def test_another_origin_and_a_server_without_any(tmp_path: Path) -> None:
    for name, options in (("a", {"allowed_origins": (PAGE,)}), ("b", {})):
        house = make_house(tmp_path / name, api_key=("k",), **options)
        answer = preflight(house, "https://evil.example.org")
        assert answer.status_code == 405, "never 401"
        found = house.post(
            "/v1/chat/completions",
            chat_body(),
            headers={"Authorization": "Bearer k", "Origin": "https://evil.example.org"},
        )
        assert found.status_code == 200
        assert not any(header.startswith("access-control") for header in (*answer.headers, *found.headers))


def test_origins_are_judged_at_the_start() -> None:
    assert load({"allowed_origins": ["*"], "model": "x"}, {}).allowed_origins == ("*",)
    assert Settings().allowed_origins == ()
    for wrong in ("app.example.org", "https://app.example.org/", "https://a.org/path"):
        with pytest.raises(SettingsError, match="--allowed-origins"):
            load({"allowed_origins": [wrong], "model": "x"}, {})
