"""`allowed_token_ids` and `bad_words`: what the worker is told, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.api.token_limits import banned_sequences, spellings
from server.config import Settings
from server.errors import InvalidRequest
from server.messages import Constraint
from server.prompt import Scribe
from tests.api.house import House, chat_body, make_house, run
from tests.api.model_folder import END, make_folder

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("model"))


def ask(house: House, path: str, **fields: Any) -> Any:
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi", "max_tokens": 9}
    return house.post(path, {**body, **fields})


def constraint(house: House, path: str, **fields: Any) -> Constraint | None:
    response = ask(house, path, **fields)
    assert response.status_code == 200, response.text
    return house.engine.submits[-1].constraint


def refusal(house: House, path: str, **fields: Any) -> tuple[str, str]:
    before = len(house.engine.submits)
    response = ask(house, path, **fields)
    assert response.status_code == 400, response.text
    assert len(house.engine.submits) == before
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_limits_reach_the_worker(house: House, path: str, stream: bool) -> None:
    assert constraint(house, path, stream=stream, allowed_token_ids=[9, 7, 9]) == Constraint(allowed=(7, 9))
    # A blank before a word changes nothing here: its bytes end in those of the bare word.
    found = constraint(house, path, stream=stream, bad_words=["no", " x", "no way"])
    assert found == Constraint(banned=((*b"x",), (*b"no",), (*b"no way",)))
    both = constraint(house, path, stream=stream, bad_words=["<|end|>"], allowed_token_ids=[7])
    assert both == Constraint(allowed=(7,), banned=((*b"<|end|>",),)), "the text, not the special token"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_nothing_asked(house: House, path: str) -> None:
    for fields in ({}, {"allowed_token_ids": None}, {"bad_words": []}, {"bad_words": None}):
        assert constraint(house, path, **fields) is None


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
        ({"allowed_token_ids": [300]}, "allowed_token_ids", "300 tokens"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "at least 0"),
        ({"allowed_token_ids": [1] * (2**18 + 1)}, "allowed_token_ids", "at most 262144"),
        ({"bad_words": ["a"] * 129}, "bad_words", "at most 128"),
        ({"bad_words": [""]}, "bad_words[0]", "1 to 1024"),
        ({"bad_words": ["  "]}, "bad_words[0]", "1 to 1024"),
        ({"bad_words": ["x" * 1025]}, "bad_words[0]", "1 to 1024"),
        ({"bad_words": ["a\x00"]}, "bad_words[0]", "NUL"),
        ({"bad_words": [5]}, "bad_words[0]", "string"),
        ({"bad_words": "no"}, "bad_words", "array"),
        ({"bad_words": [f"{number:04} {'y' * 20}" for number in range(60)]}, "bad_words", "at most 1024 tokens"),
        ({"allowed_token_ids": [97], "bad_words": ["a"], "ignore_eos": True}, "allowed_token_ids", "no token"),
        ({"allowed_token_ids": [END], "min_tokens": 2}, "allowed_token_ids", "min_tokens"),
    ],
)
def test_what_is_refused(house: House, path: str, fields: dict[str, Any], param: str, words: str) -> None:
    found, message = refusal(house, path, **fields)
    assert found == param
    assert words in message


def test_a_stop_token_is_a_way_out(house: House) -> None:
    assert constraint(house, TEXT, allowed_token_ids=[97], bad_words=["a"]) is not None
    assert constraint(house, TEXT, allowed_token_ids=[97], bad_words=["a"], ignore_eos=True, stop_token_ids=[5])


def test_spellings_and_sequences() -> None:
    assert spellings([" a", "a", "b"]) == ("a", " a", "b", " b")
    assert banned_sequences([[1, 2], [3, 1, 2], [9], [2, 1], [1, 2], []], 10) == ((9,), (1, 2), (2, 1))
    assert banned_sequences([[10], [3, 10]], 10) == (), "what the model cannot say"
    with pytest.raises(InvalidRequest, match="these have 1025"):
        banned_sequences([[1] * 1025], 10)


def test_words_of_a_vocabulary_that_tells_blanks_apart(tmp_path: Path) -> None:
    make_folder(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    blank = next(letter for letter, id_ in vocabulary.items() if id_ == 32)
    spec["model"]["vocab"] |= {"no": 270, f"{blank}no": 271}
    spec["model"]["merges"] = [["n", "o"], [blank, "no"]]
    (tmp_path / "other").mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "other" / name).write_text((tmp_path / name).read_text())
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec))

    scribe = Scribe(Settings(model=str(tmp_path / "other")))
    try:
        assert run(scribe.encode_words(spellings(["no"]), "bad_words")) == [(270,), (271,)]
    finally:
        scribe.close()
