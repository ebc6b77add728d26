"""The demo model that comes with the package: complete, small and consistent."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from drafters.head.store import load_head
from drafters.ngram.table import Table, TableError, tokenizer_fingerprint
from server import demo
from server.cli import main
from server.config import Settings, load
from server.model_files import read, served_names
from tests.tables import successors
from verifier.fingerprint import model_fingerprint

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}
MB = 1_000_000


def size_of(*paths: Path) -> int:
    return sum(found.stat().st_size for path in paths for found in [path, *path.rglob("*")] if found.is_file())


def test_the_files_are_there_and_no_others() -> None:
    assert {path.name for path in demo.MODEL.iterdir()} == FILES
    assert (demo.FOLDER / "README.md").is_file()


def test_sizes_stay_bounded() -> None:
    assert 5 * MB <= size_of(demo.MODEL) <= 20 * MB
    assert size_of(demo.TRIGRAM_TABLE) <= 6 * MB
    assert size_of(demo.TRIGRAM_TABLE, demo.FOLDER / "ctc") <= 12 * MB


def test_the_table_is_for_this_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    table = Table.open(demo.TRIGRAM_TABLE, tokenizer_fingerprint(vocab))
    assert table.info.tokenizer == demo.NAME
    first, second = tokenizer.encode(" would like", add_special_tokens=False).ids
    assert tokenizer.decode([successors(table, first, second)[0][0]]) == " to"
    with pytest.raises(TableError, match="was built for the tokenizer of 'foretoken-demo'"):
        Table.open(demo.TRIGRAM_TABLE, tokenizer_fingerprint({**vocab, "one more": len(vocab)}))


def test_the_model_can_chat_and_names_its_end() -> None:
    files = read(demo.MODEL)
    assert files.chat_template is not None
    assert files.eos_ids == (4,)


def test_its_settings_bring_its_table_and_head_and_a_name_of_its_own() -> None:
    settings = load({}, {}, demo.defaults())
    assert demo.is_demo(settings.model)
    assert (settings.drafter, settings.trigram_table) == ("hybrid", str(demo.TRIGRAM_TABLE))
    assert settings.ctc_head == str(demo.CTC_HEAD)
    assert served_names(settings) == (demo.NAME,)


def test_a_named_model_never_gets_the_table_not_even_the_same_folder() -> None:
    named = load({"model": str(demo.MODEL)}, {}, demo.defaults())
    assert named == Settings(model=str(demo.MODEL))
    assert named.trigram_table == named.ctc_head == ""


def test_the_head_is_for_this_model() -> None:
    head, info = load_head(demo.CTC_HEAD, model_fingerprint(str(demo.MODEL)), demo.NAME)
    assert info.model == demo.NAME
    assert head.shape.vocab_size == 4096


def test_every_file_is_package_data() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["server.demo"]
    files = [path for path in demo.FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(files) >= len(FILES) + 2
    for path in files:
        name = path.relative_to(demo.FOLDER).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_the_card_names_data_licences_and_limits() -> None:
    card = (demo.FOLDER / "README.md").read_text(encoding="utf-8")
    for words in ("CC BY-SA 4.0", "CC BY 4.0", "Schema-Guided Dialogue", "Taskmaster-4", "toy", "Apache-2.0"):
        assert words in card


def test_a_table_of_another_tokenizer_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.tri"
    content = demo.TRIGRAM_TABLE.read_bytes()
    mark = Table.open(demo.TRIGRAM_TABLE).info.fingerprint.encode()
    other.write_bytes(content.replace(mark, b"0" * len(mark), 1))
    assert main(["serve", str(demo.MODEL), "--no-compile", "--trigram-table", str(other), "--port", "0"]) == 2
    err = capfd.readouterr().err
    assert f"{other}: this tri-gram table was built for the tokenizer of" in err
