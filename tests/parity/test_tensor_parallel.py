"""A model split over two ranks says what it says on one; a rank that dies is a worker that dies; refusals by name."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from server.config import Settings, SettingsError
from server.config import load as load_settings
from server.engine import Engine
from server.messages import Speculation, Submit
from server.worker.apart import is_device_lost
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.model import ModelError
from verifier.options import VerifierOptions
from verifier.parallel.wire import RankLost
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

NUM_TOKENS = 24


@contextmanager
def loaded(model: str, size: int, timeout_s: float = 60.0) -> Iterator[Backend]:
    verifier = load_backend(
        VerifierOptions(
            model=model,
            device="cpu",
            threads=1,
            max_rows=4,
            max_positions=64,
            num_pages=22,
            page_size=8,
            max_model_len=160,
            is_eager=True,
            tensor_parallel_size=size,
            rank_timeout_s=timeout_s,
        )
    )
    try:
        yield verifier
    finally:
        verifier.close()


def sampling(index: int) -> SamplingParams:
    if index % 2:
        return SamplingParams(max_tokens=NUM_TOKENS, seed=index, temperature=0.8, top_p=0.95, presence_penalty=0.3)
    return SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0)


def texts(vocab_size: int) -> list[Submit]:
    rng = np.random.default_rng(5)
    lengths = (3, 50, 17, 70, 9, 31)
    return [
        submit(f"r{index}", rng.integers(3, vocab_size, length).tolist(), sampling(index))
        for index, length in enumerate(lengths)
    ]


def answered(verifier: Backend, answers: dict[tuple[int, ...], list[int]]) -> tuple[Run, AnswerFuzz]:
    """Answers under random trees, with the known `answers` in them."""
    vocab_size = verifier.geometry.vocab_size
    fuzz = AnswerFuzz(4, vocab_size, answers)
    return run_all(make_loop(verifier, {"fuzz": fuzz}), texts(vocab_size)), fuzz


def assert_same_text(model: str) -> None:
    with loaded(model, 1) as one:
        plain, _ = answered(one, {})
        vocab_size = one.geometry.vocab_size
    with loaded(model, 2) as two:
        assert two._pool.layer(0)[0].shape[1] == one._pool.layer(0)[0].shape[1] // 2
        known = {tuple(text.prompt): plain.answers[text.id] for text in texts(vocab_size)}
        drafted, fuzz = answered(two, known)
    assert drafted.answers == plain.answers
    assert all(len(answer) == NUM_TOKENS for answer in plain.answers.values())
    assert fuzz.num_accepted > NUM_TOKENS  # K/V were moved on both ranks
    assert drafted.num_preempted > 0


def test_two_ranks_give_the_text_of_one(tmp_path: Path) -> None:
    # Of 65 columns and of 97 tokens one rank has more than the other.
    assert_same_text(save_model("qwen2", tmp_path, tie_word_embeddings=True, intermediate_size=65))


def test_two_ranks_give_the_text_of_one_on_a_real_model(shared: Path) -> None:
    assert_same_text(str(shared / "models" / "stories260K"))


def script(verifier: Backend) -> tuple[Verdict, Verdict]:
    """A prompt whose pages were told with a step that failed, then a tree beside the rest of another prompt."""
    trees, prompt = DraftTrees.allocate(2), tuple(range(5, 25))
    starts = tuple(RowStart(row, prompt, len(prompt), SamplingParams(max_tokens=9, seed=row)) for row in range(2))
    pages = tuple((row, index, 3 + 5 * row + index) for row in range(2) for index in range(4))
    chunks = (Chunk(0, 0, prompt[:-1], False), Chunk(1, 0, prompt[:3], False))
    wanted = Wanted(VOCAB, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier._attention, "plan", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            verifier.run(StepPlan(starts=starts, pages=pages, chunks=chunks), trees, wanted)
    first = verifier.run(StepPlan(chunks=chunks), trees, wanted)
    trees.append([prompt[-1], 7, 8, 9], [-1, 0, 0, 2], [1.0] * 4, [0] * 4)
    plan = StepPlan(trees=(TreeSlot(0, len(prompt) - 1, 4),), chunks=(Chunk(1, 3, prompt[3:12], False),))
    return first, verifier.run(plan, trees, wanted)


def test_what_rank_0_tells_is_whole_and_a_rank_that_hangs_is_lost(tmp_path: Path) -> None:
    folder = save_model("phi3", tmp_path, num_hidden_layers=2)
    with loaded(folder, 1) as one:
        expected, weights = script(one), one.shared_weights
    with loaded(folder, 2, timeout_s=3.0) as two:
        found, gathered = script(two), two.shared_weights
        assert two._pool.layer(0)[0].shape == one._pool.layer(0)[0].shape  # its plan leaves all heads on every rank
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.hidden is not None
            assert theirs.hidden is not None
            torch.testing.assert_close(mine.hidden.states, theirs.hidden.states, atol=1e-5, rtol=1e-5)
        assert found[1].candidate_logits is not None
        np.testing.assert_allclose(found[1].candidate_logits, expected[1].candidate_logits, atol=1e-4)
        assert torch.equal(gathered.input_embedding, weights.input_embedding)
        assert torch.equal(gathered.output_embedding, weights.output_embedding)
        (rank,) = ranks_of(os.getpid())
        os.kill(rank, signal.SIGSTOP)
        with pytest.raises(RankLost) as caught:
            script(two)
        assert is_device_lost(caught.value)
    assert not is_alive(rank)


def test_what_cannot_be_split_is_refused_by_name(tmp_path: Path) -> None:
    cases = {
        "gpt2 has no tensor parallel plan": ("gpt2", {}, 2),
        "gpt_oss has no tensor parallel plan for its layers": ("gpt_oss", {}, 2),
        "1 K/V heads of model.layers.0.self_attn do not divide by tensor_parallel_size 2": (
            "llama",
            {"num_key_value_heads": 1},
            2,
        ),
        "4 attention heads of model.layers.0.self_attn do not divide by tensor_parallel_size 3": ("llama", {}, 3),
    }
    for index, (line, (family, changes, size)) in enumerate(cases.items()):
        folder = save_model(family, tmp_path / str(index), **changes)
        with pytest.raises(ModelError, match="cannot be split over") as caught, loaded(folder, size):
            pass
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not ranks_of(os.getpid())
    with pytest.raises(SettingsError, match="must be at least 1"):
        load_settings({"model": "m", "tensor_parallel_size": "0"}, {})


def parent_and_state(pid: str) -> tuple[int, str]:
    """Of a process; (0, "X") if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, "X"
    return int(fields[1]), fields[0]


def ranks_of(pid: int) -> list[int]:
    """Its other ranks; a worker has a child that compiles as well."""
    children = [name for name in os.listdir("/proc") if name.isdigit() and parent_and_state(name)[0] == pid]
    return [int(name) for name in children if b"verifier.parallel" in Path(f"/proc/{name}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    return parent_and_state(str(pid))[1] not in "XZ"


async def until_dead(pid: int) -> None:
    ends = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < ends, f"process {pid} is an orphan"
        await asyncio.sleep(0.02)


async def collect(engine: Engine, text: Submit, kill: signal.Signals | None = None) -> list[int]:
    """The tokens of a stream; after a few of them rank 1 gets the signal."""
    tokens: list[int] = []
    async for delta in engine.stream(text):
        tokens += delta.tokens
        if kill is not None and len(tokens) >= 5:
            assert engine.worker_pid is not None
            (rank,) = ranks_of(engine.worker_pid)
            os.kill(rank, kill)
            kill = None
    return tokens


def test_a_killed_rank_is_a_worker_that_died(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, num_hidden_layers=1)
    with loaded(folder, 1) as one:
        plain, _ = answered(one, {})
    asked = [
        Submit(text.id, text.prompt, text.sampling, Speculation("trigram", 8), "tenant") for text in texts(VOCAB)[:3]
    ]

    async def test() -> None:
        settings = Settings(
            model=folder,
            device="cpu",
            threads=1,
            max_num_seqs=4,
            num_pages=64,
            log_level="error",
            tensor_parallel_size=2,
        )
        engine = Engine(settings)
        await engine.start()
        try:
            await engine.wait_ready()
            assert engine.worker_pid is not None
            (first,) = ranks_of(engine.worker_pid)
            streams = (collect(engine, text, signal.SIGKILL if text is asked[1] else None) for text in asked)
            answers = await asyncio.gather(*streams)
            assert engine.num_restarts == 1
            await until_dead(first)
            (second,) = ranks_of(engine.worker_pid)
            os.kill(engine.worker_pid, signal.SIGKILL)
            await until_dead(second)
        finally:
            await engine.close()
        assert answers == [plain.answers[text.id] for text in asked]

    asyncio.run(asyncio.wait_for(test(), 120))
    assert not ranks_of(os.getpid())
