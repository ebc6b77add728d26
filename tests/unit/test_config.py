from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from server.config import Settings, SettingsError, add_flags, load, overruled_port, to_markdown


def flags(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return vars(parser.parse_args(words))


def test_defaults_are_those_of_the_class() -> None:
    assert load({}, {}) == Settings()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1001\nmax-nodes: 32\nmax_num_seqs: 8\n")
    environ = {"FORETOKEN_CONFIG": str(file), "FORETOKEN_PORT": "1002", "FORETOKEN_MAX_NODES": "33"}
    settings = load(flags("--port", "1003"), environ)
    assert (settings.port, settings.max_nodes, settings.max_num_seqs) == (1003, 33, 8)
    assert settings.page_size == Settings().page_size


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (("--port", "9000"), {"FORETOKEN_PORT": "8000"}, "8000"),
        (("--port", "8000"), {"FORETOKEN_PORT": "8000"}, ""),
        ((), {"FORETOKEN_PORT": "9000"}, ""),
        (("--port", "9000"), {}, ""),
    ],
)
def test_a_port_of_the_environment_that_a_flag_overrules(
    words: tuple[str, ...], environ: dict[str, str], told: str
) -> None:
    assert overruled_port(load(flags(*words), environ), environ) == told


def test_every_kind_of_value_from_every_place(tmp_path: Path) -> None:
    wanted = Settings(
        api_key=("a", "b"), enable_prefix_caching=False, drain_timeout_s=2.5, max_num_seqs=3, dtype="float32"
    )
    words = "--api-key a b --no-enable-prefix-caching --drain-timeout-s 2.5 --max-num-seqs 3 --dtype float32"
    assert load(flags(*words.split()), {}) == wanted
    environ = {
        "FORETOKEN_API_KEY": "a, b",
        "FORETOKEN_ENABLE_PREFIX_CACHING": "off",
        "FORETOKEN_DRAIN_TIMEOUT_S": "2.5",
        "FORETOKEN_MAX_NUM_SEQS": "3",
        "FORETOKEN_DTYPE": "float32",
    }
    assert load({}, environ) == wanted
    file = tmp_path / "c.yaml"
    file.write_text(
        "api_key: [a, b]\nenable_prefix_caching: false\ndrain_timeout_s: 2.5\nmax_num_seqs: 3\ndtype: float32\n"
    )
    assert load(flags("--config", str(file)), {}) == wanted


def test_whole_numbers_serve_as_numbers_and_one_text_as_several(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("keep_alive_s: 3\napi_key: only\n")
    settings = load({"config": str(file)}, {})
    assert settings.keep_alive_s == 3.0
    assert isinstance(settings.keep_alive_s, float)
    assert settings.api_key == ("only",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port: must be at most 65535, got 70000"),
        (["--port", "-1"], "--port: must be at least 0, got -1"),
        (["--port", "http"], "--port: expected a whole number, got 'http'"),
        (["--keep-alive-s", "nan"], "--keep-alive-s: must be a finite number"),
        (["--kv-cache-gib", "inf"], "--kv-cache-gib: must be a finite number"),
        (["--dtype", "float64"], "--dtype: must be one of auto, float32, bfloat16, float16, got 'float64'; did you"),
        (["--max-nodes", "65"], "--max-nodes: must be at most 64, got 65"),
        (["--max-num-seqs", "512", "--max-num-batched-tokens", "256"], "must be at least --max-num-seqs (512)"),
        (["--num-pages", "9", "--kv-cache-gib", "1"], "pass one of them"),
        (["--api-key", "a", ""], "--api-key: expected one or several texts"),
        (["--api-key", "a", "/"], "--api-key: / is a folder, not a key"),
        (["--api-key", "a "], "--api-key: a text has blanks around it"),
    ],
)
def test_a_wrong_flag_names_itself_and_the_limit(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(flags(*words), {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_model_length: 5", "no such setting; did you mean max_model_len?"),
        ("port: true", "expected a whole number, got True"),
        ("port: 8000.0", "expected a whole number, got 8000.0"),
        ("port: '8000'", "expected a whole number, got '8000'"),
        ("enable_prefix_caching: 1", "expected true or false, got 1"),
        ("api_key: [1]", "expected one or several texts"),
        ("api_key: ' a'", "blanks around it"),
        ("- port", "expected a mapping of settings, found a list"),
        ("{", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_told_with_its_name_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load({"config": str(file)}, {})
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(SettingsError, match=r"no/such\.yaml: No such file"):
        load({"config": "no/such.yaml"}, {})


def test_environment_mistakes_are_told_and_foreign_names_left_alone() -> None:
    with pytest.raises(SettingsError, match="FORETOKEN_MAX_NODE: no such setting; did you mean max_nodes"):
        load({}, {"FORETOKEN_MAX_NODE": "3"})
    foreign = {"FORETOKEN_SERVICE_HOST": "10.0.0.1", "FORETOKEN_PORT_8000_TCP": "tcp://10.0.0.1:8000", "PORT": "1"}
    assert load({}, foreign) == Settings()
    with pytest.raises(SettingsError, match="enableServiceLinks"):
        load({}, {"FORETOKEN_PORT": "tcp://10.0.0.1:8000"})


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_a_variable_for_keys_without_a_key_does_not_turn_them_off(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^FORETOKEN_API_KEY: set, but there is no key in it") as caught:
        load({}, {"FORETOKEN_API_KEY": text})
    assert "\n" not in str(caught.value)
    assert load({}, {"FORETOKEN_SERVED_MODEL_NAME": ""}) == Settings()


def test_defaults_are_within_their_own_bounds() -> None:
    words: list[str] = []
    for entry in fields(Settings):
        if entry.type in ("int", "float", "str") and entry.default != "":
            words += ["--" + entry.name.replace("_", "-"), str(entry.default)]
    assert load(flags(*words), {}) == Settings()


def test_every_field_has_a_sentence_and_a_row_in_the_table() -> None:
    table = to_markdown()
    for entry in fields(Settings):
        assert entry.metadata["help"].strip()
        assert f"`FORETOKEN_{entry.name.upper()}`" in table


def test_paths_start_at_home_wherever_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("model: ~/model\n")
    settings = load(flags("--config", str(file), "--trigram-state=~/state"), {"FORETOKEN_TRIGRAM_TABLE": "~/table"})
    found = (settings.model, settings.trigram_table, settings.trigram_state)
    assert found == tuple(str(tmp_path / name) for name in ("model", "table", "state"))


WITHOUT_MODEL = {"model": "/demo", "trigram_table": "/demo.tri", "served_model_name": ("demo",)}


def test_values_for_no_model_count_only_when_no_source_names_one(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: mine\n")
    named = [(flags("--model", "mine"), {}), ({}, {"FORETOKEN_MODEL": "mine"}), (flags("--config", str(file)), {})]
    for words, environ in named:
        assert load(words, environ, WITHOUT_MODEL) == Settings(model="mine")
    assert load({}, {}, WITHOUT_MODEL) == Settings(**WITHOUT_MODEL)
    assert load({}, {"FORETOKEN_MODEL": ""}, WITHOUT_MODEL) == Settings(**WITHOUT_MODEL)


def test_what_the_user_set_wins_over_values_for_no_model() -> None:
    settings = load(flags("--trigram-table", "t"), {"FORETOKEN_SERVED_MODEL_NAME": "a"}, WITHOUT_MODEL)
    assert (settings.model, settings.trigram_table, settings.served_model_name) == ("/demo", "t", ("a",))
    assert load(flags("--trigram-table", ""), {}, WITHOUT_MODEL).trigram_table == ""
