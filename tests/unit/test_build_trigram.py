from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from drafters.trigram.table import Table, tokenizer_fingerprint
from server.cli import main
from server.commands.build_trigram import Reader
from server.model_files import read


@pytest.fixture(scope="module")
def model(shared: Path) -> Path:
    return shared / "models/booking5m"


DIALOGUE = [{"role": "user", "content": "A table for two."}, {"role": "assistant", "content": "Which city?"}]


def test_documents_are_read_as_the_target_reads_them(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    reader = Reader(read(model))
    assert reader.render is not None
    text = reader.render(DIALOGUE)
    ids = theirs.apply_chat_template(DIALOGUE, tokenize=True, add_generation_prompt=False, return_dict=False)
    assert reader.encode([text]) == [list(ids)]
    assert reader.vocab == theirs.get_vocab()


def test_a_plain_text_begins_as_the_tokenizer_says(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "models/tiny1m"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Reader(read(folder)).encode(["Once upon a time", ""]) == [theirs("Once upon a time").input_ids, [1]]


def test_files_become_a_table_that_opens(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": DIALOGUE}) + "\n{broken\n" + json.dumps({"text": "Which city?"}) + "\n")
    out = tmp_path / "chat.tri"
    words = ["build-trigram", "--model", str(model), "--data", str(data), "--out", str(out), "--quiet"]
    assert main([*words, "--top-k", "4"]) == 0
    told = capsys.readouterr().out
    assert "documents     2" in told
    assert "malformed     1" in told
    assert "chat.jsonl:2" in told
    table = Table.open(out, tokenizer_fingerprint(Reader(read(model)).vocab))
    assert table.info.top_k == 4
    assert table.info.tokenizer == "booking5m"


def test_the_target_writes_its_own_corpus(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build-trigram", "--model", str(shared / "models/tiny1m"), "--quiet", "--generate", "5"]
    prompts = tmp_path / "p.txt"
    prompts.write_text("Once upon a time\nTom had a\n")
    out = tmp_path / "own.tri"
    assert main([*words, "--max-tokens", "20", "--prompts", str(prompts), "--out", str(out)]) == 0
    assert "documents     5" in capsys.readouterr().out
    info = Table.open(out).info
    # Each answer comes with the last two tokens of its prompt.
    assert 5 * 3 <= info.num_tokens <= 5 * 22


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to learn from"),
        (["--data", "absent.txt"], "absent.txt: no such file"),
        (["--data", "x.txt", "--top-k", "0"], "--top-k: must be 1 to 255"),
        (["--generate", "1", "--temperature", "nan"], "--temperature: must be 0 to 2"),
        (["--generate", "1", "--prompts", "absent.txt"], "absent.txt: No such file"),
    ],
)
def test_mistakes_are_one_line(
    model: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.tri"
    assert main(["build-trigram", "--model", str(model), "--out", str(out), "--quiet", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_chat_prompt_needs_a_chat_template(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"question": "why?"}\n')
    words = ["--model", str(shared / "models/tiny1m"), "--out", str(tmp_path / "t"), "--generate", "1"]
    assert main(["build-trigram", *words, "--prompts", str(prompts)]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(model / "config.json", tmp_path)
    assert main(["build-trigram", "--model", str(tmp_path), "--out", str(tmp_path / "t"), "--data", "x.txt"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
