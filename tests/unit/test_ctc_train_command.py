from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from drafters.head import files
from drafters.head.store import HeadError, load_head
from drafters.rows import MAX_FRAMES, RECENT
from server.cli import main
from server.config import SettingsError
from server.model_files import read
from tests.api.model_folder import END, VOCAB_SIZE, make_folder
from training.answer_store import AnswerStore, DataPlan, Record
from training.corpus_reader import CorpusStats
from training.prompts import AnswerPrompt, corpus_prompts, digest_of
from training.text import TextEncoder
from training.train_ctc import _LIMITS
from verifier.fingerprint import model_fingerprint

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["--max-tokens", "12", "--steps", "30", "--width", "16", "--layers", "1", "--slots", "4", "--window", "8"]
FLAGS = [*SMALL, "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer and a chat template."""
    folder = make_folder(tmp_path_factory.mktemp("target") / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=END,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def dialogue(number: int, num_turns: int = 2) -> str:
    messages = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"{number} asks {turn}"})
        messages.append({"role": "assistant", "content": f"{turn} says {number}"})
    return json.dumps({"messages": messages})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "talk.jsonl"
    lines = [dialogue(number) for number in range(40)] + [json.dumps({"text": f"Story {n}: once"}) for n in range(20)]
    path.write_text("\n".join(lines) + "\n")
    return path


def words(model: Path, corpus: Path, out: Path, *more: str) -> list[str]:
    return ["train-ctc", "--model", str(model), "--data", str(corpus), "--out", str(out), *FLAGS, *more]


def held_out(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]


# ---- what is asked


def prompts_of(model: Path, path: Path, count: int, seed: int = 0) -> tuple[list[AnswerPrompt], CorpusStats]:
    return corpus_prompts([path], TextEncoder(read(model)), count, "<|endoftext|>", seed)


def test_every_assistant_turn_is_asked_for(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(dialogue(7, 3))
    found, _ = prompts_of(model, path, 3)
    reader = TextEncoder(read(model))
    messages = json.loads(dialogue(7, 3))["messages"]
    assert [list(prompt.tokens) for prompt in found] == [reader.chat_ids(messages[:end]) for end in (1, 3, 5)]
    assert {prompt.document for prompt in found} == {0}


def test_the_same_is_asked_again_and_texts_are_cut(model: Path, corpus: Path, tmp_path: Path) -> None:
    digests = [digest_of(prompts_of(model, corpus, 50, seed)[0]) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    path = tmp_path / "long.txt"
    path.write_text("<|endoftext|>".join(f"{number} " * 300 for number in range(40)))
    found = prompts_of(model, path, 400)[0]
    assert len(found) == 160, "a small corpus is asked four times"
    assert {len(prompt.tokens) for prompt in found} <= set(range(16, 81))
    temperatures = [prompt.temperature for prompt in found]
    assert set(temperatures) == {0.0, 0.7, 1.0}
    assert 50 <= temperatures.count(0.0) <= 110


def test_malformed_lines_are_counted_and_an_empty_corpus_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(["", dialogue(1), "{broken", '{"messages": []}', '{"text": "\\ud800"}', '{"text": " "}']))
    _, corpus = prompts_of(model, path, 10)
    assert corpus.num_documents == 1
    assert corpus.num_malformed == 3
    assert corpus.malformed[0].startswith(f"{path}:3: ")
    path.write_text("{broken\n")
    with pytest.raises(
        SettingsError, match=r"--data: 0 documents, and nothing in them to ask the model \(.*bad.jsonl:1"
    ):
        prompts_of(model, path, 10)


# ---- both stages


@pytest.fixture(scope="module")
def trained(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained")
    assert main(words(model, corpus, out, "--answers", "300")) == 0
    return out


def test_one_command_makes_a_head(model: Path, trained: Path) -> None:
    head, info = load_head(trained, model_fingerprint(str(model)))
    assert (head.shape.vocab_size, head.shape.num_slots, head.shape.width) == (VOCAB_SIZE, 4, 16)
    assert (info.model, info.training["step"]) == ("tiny", 30)
    assert [step for step, _ in held_out(trained)] == [10, 20, 30]
    with pytest.raises(HeadError, match="was trained for tiny"):
        load_head(trained, "0" * 64, "another")


def test_recorded_states_are_the_targets_own(model: Path, corpus: Path, trained: Path) -> None:
    manifest = json.loads((trained / "answers" / "manifest.json").read_text())
    store = AnswerStore(trained / "answers", DataPlan(**manifest["plan"]))
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    shard = store.shards[0]
    asked = prompts_of(model, corpus, 300)[0]
    greedy = 0
    for index in range(0, len(shard.documents), 9):
        record: Record = shard.record(index)
        mine = (prompt.tokens for prompt in asked if prompt.document == record.document)
        prompt = next(prompt for prompt in mine if ends_with(record, prompt))
        known = [*prompt, *record.tokens[record.tokens.size - record.num_answer :].tolist()]
        with torch.inference_mode():
            out = network(torch.tensor([known]), output_hidden_states=True)
        states = out.hidden_states[-1][0, record.first : len(known) - 1].numpy()
        np.testing.assert_allclose(record.states, states, atol=2e-2)
        if record.temperature == 0.0:
            greedy += 1
            best = out.logits[0, -record.num_answer - 1 : -1].argmax(-1).tolist()
            assert best == known[-record.num_answer :]
    assert greedy


def ends_with(record: Record, prompt: tuple[int, ...]) -> bool:
    """Whether the record goes on from this prompt."""
    kept = record.tokens[: record.tokens.size - record.num_answer].tolist()
    return record.first + len(kept) == len(prompt) and list(prompt[len(prompt) - len(kept) :]) == kept


def test_several_heads_are_trained_on_the_same_answers(
    model: Path, corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--answers", "300", "--answers-dir", str(trained / "answers"), "--slots", "2", "--draft-vocab", "30"]
    assert main(words(model, corpus, tmp_path, *more)) == 0
    assert "answers       0 written now" in capsys.readouterr().out
    head, _ = load_head(tmp_path)
    assert head.shape.num_slots == 2
    assert head.draft_tokens.numel() == 30
    assert not (tmp_path / "answers").exists()
    store = AnswerStore(
        trained / "answers", DataPlan(**json.loads((trained / "answers" / "manifest.json").read_text())["plan"])
    )
    shard = store.shards[0]
    said = np.concatenate([shard.answer(index) for index in range(len(shard.documents))])
    assert set(np.bincount(said).argsort()[-10:].tolist()) <= set(head.draft_tokens.tolist()), "the most frequent ones"


def test_a_second_run_changes_nothing(model: Path, corpus: Path, trained: Path) -> None:
    """What is whole is read: no answer is written again, and no step is taken."""
    kept = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main(words(model, corpus, trained, "--answers", "300")) == 0
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == kept


def test_a_width_that_cannot_be_is_told_before_answers_are_written(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(model, corpus, tmp_path, "--answers", "20", "--width", "100")) == 2
    assert "--width: must be a multiple of 8" in capsys.readouterr().err
    assert not list(tmp_path.glob("answers/shard-*"))


def test_a_run_that_is_killed_comes_to_the_same_end(model: Path, corpus: Path, trained: Path, tmp_path: Path) -> None:
    """In stage one; tests of the trainer cut off stage two."""
    arguments = words(model, corpus, tmp_path, "--answers", "300")
    command = [sys.executable, "-m", "server.cli", *arguments]
    first = tmp_path / "answers" / "shard-00000.safetensors"
    deadline = time.monotonic() + 300
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        told = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, told
    assert first.exists(), "it never came so far"
    assert not (tmp_path / "train.jsonl").exists()
    made = first.stat().st_mtime_ns
    assert main(arguments) == 0
    assert first.stat().st_mtime_ns == made, "a finished shard is not made again"
    ours, theirs = held_out(tmp_path), held_out(trained)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert ours[-1][1] == pytest.approx(theirs[-1][1], rel=0.01)
    load_head(tmp_path, model_fingerprint(str(model)))


# ---- what cannot work is one line


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("foretoken: ")
    return line


def test_a_full_disk_is_one_line(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(model, corpus, tmp_path, "--answers", "300")
    fsync, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:  # a file and its folder, for a shard and for the manifest
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        line = refusal(arguments, capsys)
    assert "No space left on device; 1 finished shards stay, run again to go on" in line
    assert [path.name for path in (tmp_path / "answers").glob("*.part")] == []


def test_a_head_that_cannot_be_written_is_one_line(
    model: Path, corpus: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "head.safetensors").mkdir()  # no file can take its place
    more = ["--answers", "300", "--answers-dir", str(trained / "answers"), "--steps", "1"]
    line = refusal(words(model, corpus, tmp_path, *more), capsys)
    assert line == f"foretoken: cannot write {tmp_path / 'head.safetensors'}: Is a directory"
    assert (tmp_path / "checkpoint.safetensors").exists(), "what was trained stays"


def test_a_corpus_smaller_than_a_batch_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.jsonl"
    path.write_text(dialogue(1) + "\n")
    line = refusal(words(model, path, tmp_path / "out"), capsys)
    assert "usable answers are too few: 16 to train on and 16 to hold out" in line


def test_other_settings_do_not_mix_with_what_is_there(
    model: Path, corpus: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(words(model, corpus, trained, "--answers", "200"), capsys)
    assert "holds the data of another run" in line
    line = refusal(words(model, corpus, trained, "--answers", "300", "--max-model-len", "128"), capsys)
    assert "holds the data of another run (max_model_len 256, now 128)" in line
    line = refusal(words(model, corpus, trained, "--answers", "300", "--width", "32"), capsys)
    assert "is of a run with other settings (lr " in line
    assert "; width 16, now 32)" in line


def test_no_head_is_trained_that_a_server_cannot_use_whole() -> None:
    assert _LIMITS["window"] == (1, RECENT - 1), "states of more tokens are lost before the head reads them"
    assert _LIMITS["slots"] == (1, MAX_FRAMES)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--steps", "0"], "--steps: must be 1 to"),
        (["--width", "20"], "--width: must be a multiple of 8, got 20"),
        (["--lr", "nan"], "--lr: must be 0.0 to"),
        (["--window", "512"], "--window: must be 1 to 511, got 512"),
        (["--separator", "\n\n"], "--separator: a line end cannot part documents, texts are read line by line"),
        (["--minutes", "5"], "--minutes: no such flag"),
    ],
)
def test_wrong_flags_are_one_line(
    model: Path, corpus: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(words(model, corpus, tmp_path, "--answers", "40", *more), capsys)
