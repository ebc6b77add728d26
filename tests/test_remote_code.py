"""Code that comes with a model is never run, whatever a terminal answers."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.errors import StartupError
from server.model_files import read
from tests.api.model_folder import make_folder
from tests.families import make_config, save_model
from verifier.load import load_backend
from verifier.model import ModelError, load_config
from verifier.options import VerifierOptions

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("server", "drafters", "verifier", "tests/bench")
MAKERS = ("from_pretrained", "from_config", "from_model_config")
WITHOUT_CODE = ("AutoHfQuantizer",)
"""Takes no such argument: it chooses among the classes of transformers."""

CLASSES = {name: f"theirs.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
AUTO_MAP = {**CLASSES, "AutoTokenizer": ["theirs.AutoTokenizer", "theirs.AutoTokenizer"]}


def makers() -> list[tuple[str, ast.Call]]:
    found = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_whatever_is_made_of_a_folder_is_made_without_its_code() -> None:
    calls = makers()
    assert len(calls) > 10
    for place, call in calls:
        assert isinstance(call.func, ast.Attribute)
        if isinstance(call.func.value, ast.Name) and call.func.value.id in WITHOUT_CODE:
            continue
        told = {word.arg: word.value for word in call.keywords}.get("trust_remote_code")
        assert isinstance(told, ast.Constant), f"{place} does not say trust_remote_code=False"
        assert told.value is False, f"{place} does not say trust_remote_code=False"


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))


def with_code(folder: Path, **config: Any) -> Path:
    """Put code into a folder that leaves a mark when it is run."""
    mark = folder / "it_ran"
    (folder / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": AUTO_MAP, **config}))
    return mark


@pytest.mark.usefixtures("willing")
def test_a_configuration_that_needs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = with_code(make_folder(tmp_path), model_type="theirs")
    with pytest.raises(ModelError, match=r"needs code of its own \(auto_map in config\.json\), which is never run"):
        load_config(str(tmp_path))
    assert main(["check-model", str(tmp_path)]) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1
    assert "which is never run" in refusal
    assert read(tmp_path).tokenizer_json, "its tokenizer needs no code"
    assert not mark.exists()


@pytest.mark.usefixtures("willing")
def test_a_tokenizer_that_needs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = with_code(make_folder(tmp_path), model_type="theirs")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "tokenizer_class": "Theirs"}))
    with pytest.raises(StartupError, match=r"needs code of its own \(auto_map in tokenizer_config\.json\)"):
        read(tmp_path)
    data = tmp_path / "data.txt"
    data.write_text("a")
    assert main(["build-trigram", "--model", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not mark.exists()


@pytest.mark.usefixtures("willing")
def test_a_model_that_transformers_knows_is_loaded_by_the_class_of_transformers(tmp_path: Path) -> None:
    folder = Path(save_model("llama", tmp_path))
    mark = with_code(folder)
    verifier = load_backend(VerifierOptions(model=str(folder), device="cpu", threads=1))
    assert verifier.geometry.max_model_len == 256
    assert not mark.exists()


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(ModelError, match=r"has an adapter .* merge it into the weights"):
        load_config(str(tmp_path))
