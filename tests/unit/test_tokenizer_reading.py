"""A tokenizer is what transformers makes of the whole folder, and is made once."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from server import tokenizer_reading
from server.errors import StartupError
from server.model_files import read
from server.tokenizer import load_tokenizer
from server.tokenizer_child import describe
from server.tokenizer_reading import Reading, read_tokenizer
from tests.api.model_folder import END, SPECIALS, byte_letters, byte_tokenizer, make_folder

FIRST_FREE = END + 1
PLAIN = {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
TEXTS = ("a<tool>b", "a <tool> b", "<|user|>a</think>", " a  b", "x<|end|> a b")


def config(folder: Path, name: str = "tokenizer_config", **fields: Any) -> Path:
    """Change fields of a JSON file of the folder."""
    path = folder / f"{name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **fields}))
    return folder


def with_added_tokens_decoder(folder: Path) -> None:
    config(folder, added_tokens_decoder={str(FIRST_FREE): {"content": "<tool>", **PLAIN}})


def with_added_tokens_file(folder: Path) -> None:
    config(folder, "added_tokens", **{"<tool>": FIRST_FREE})


def with_another_flag(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config(folder, added_tokens_decoder={str(FIRST_FREE): {**PLAIN, "content": "</think>", "special": True}})


def llama_like(folder: Path, **options: Any) -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz<|>/", "▁a"]
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate(pieces)}, [("▁", "a")]))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **options}))


def with_llama_class(folder: Path) -> None:
    llama_like(folder, legacy=False)


def with_llama_class_without_prefix(folder: Path) -> None:
    llama_like(folder, legacy=False, add_prefix_space=False)


def without_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    letters = [*byte_letters(), *SPECIALS]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config(folder, tokenizer_class="GPT2Tokenizer", unk_token="<|end|>")


@pytest.mark.parametrize(
    "change",
    [
        with_added_tokens_decoder,
        with_added_tokens_file,
        with_another_flag,
        with_llama_class,
        with_llama_class_without_prefix,
        without_tokenizer_json,
    ],
)
def test_ids_and_texts_are_those_of_transformers(change: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    before = _kept_bytes(folder)
    change(folder)
    assert _kept_bytes(folder) != before
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    ours = load_tokenizer(read(folder))
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text).ids == ids, text
        for skips in (True, False):
            assert ours.decode(ids, skip_special_tokens=skips) == theirs.decode(ids, skip_special_tokens=skips), text
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()


def _kept_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_named_tokens_and_the_template_are_those_of_transformers(tmp_path: Path) -> None:
    folder = config(make_folder(tmp_path), image_token="<|user|>", extra_special_tokens={"turn_token": "<|system|>"})
    files = read(folder)
    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    assert files.special_tokens == {name: str(token) for name, token in theirs.special_tokens_map.items()}
    assert files.special_tokens["turn_token"] == "<|system|>"
    assert files.chat_template == theirs.chat_template
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert read(config(folder, chat_template=templates)).chat_template == "one"


def test_a_class_that_cannot_be_had_leaves_tokenizer_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = config(make_folder(tmp_path), tokenizer_class="SiglipTokenizer")
    try:
        AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except ImportError:
        pass
    else:
        pytest.skip("sentencepiece is installed here, so that the class can be had")
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(read(folder)).encode("a<|end|>").ids == [97, END]
    assert [record.getMessage() for record in caplog.records if "is read as it stands" in record.getMessage()]
    answer = describe(folder)
    assert isinstance(answer, Reading)
    assert not answer.is_lasting, "installing the package may change it"


def test_a_vocabulary_is_not_made_up(tmp_path: Path) -> None:
    folder = config(make_folder(tmp_path), tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.json").unlink()
    assert len(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)) < 10, "transformers makes one up"
    with pytest.raises(StartupError, match=r"has no tokenizer\.json.*LlamaTokenizer needs tokenizer\.model"):
        read(folder)


def test_fields_of_generation_config_that_are_not_read_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_ones = {"temperature": 0.6, "max_new_tokens": 8, "eos_token_id": 7, "do_sample": True}
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": [], "max_length": None, "typical_p": 1.0}
    with caplog.at_level(logging.WARNING):
        assert read(make_folder(tmp_path, generation={**read_ones, **neutral})).defaults.max_new_tokens == 8
        assert not caplog.records
        read(make_folder(tmp_path, generation={**neutral, "suppress_tokens": [5], "forced_bos_token_id": 0}))
    (record,) = caplog.records
    assert "forced_bos_token_id, suppress_tokens not read" in record.getMessage()


def test_the_child_reads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))
    folder = make_folder(tmp_path / "model")
    with_added_tokens_decoder(folder)
    reading = read_tokenizer(folder)
    assert reading == describe(folder)
    monkeypatch.setattr(tokenizer_reading, "CHILD_COMMAND", ("false",))
    assert read_tokenizer(folder) == reading
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert read_tokenizer(copy) == reading, "the content counts, not the place"
    config(copy, eos_token="<|user|>")
    with pytest.raises(StartupError, match="the process that reads it ended with 1"):
        read_tokenizer(copy)
    (kept,) = (tmp_path / "temp").glob("foretoken-*/tokenizer-*.json")
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(StartupError, match="the process that reads it ended with 1"):
        read_tokenizer(folder)
