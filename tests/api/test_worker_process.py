"""The real worker process over a tiny random model: the same text after a kill -9, one line when it cannot serve."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from drafters import MASKS, PLAIN
from server.config import Settings
from server.engine import Engine
from server.errors import StartupError
from server.messages import Speculation, Submit
from tests.families import VOCAB, save_model
from verifier.plan import SamplingParams

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def settings(model: str, **changes: object) -> Settings:
    values: dict[str, object] = {
        "model": model,
        "threads": 1,
        "compile": False,
        "max_num_seqs": 4,
        "log_level": "warning",
    }
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


def sampled(index: int, drafter: str) -> Submit:
    """Sampling with every kind of processor, penalties included."""
    sampling = SamplingParams(
        max_tokens=NUM_TOKENS,
        seed=index,
        temperature=0.8,
        top_p=0.95,
        min_p=0.02,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
    )
    prompt = tuple(1 + (index * 7 + step * 3) % (VOCAB - 1) for step in range(5 + index))
    return Submit(f"{drafter}{index}", prompt, sampling, Speculation(drafter, 16), "tenant")


async def collect(engine: Engine, submit: Submit, kill_after: int = NUM_TOKENS + 1) -> list[int]:
    tokens: list[int] = []
    async for delta in engine.stream(submit):
        tokens += delta.tokens
        if len(tokens) >= kill_after:
            kill_after = NUM_TOKENS + 1
            assert engine.worker_pid is not None
            os.kill(engine.worker_pid, signal.SIGKILL)
    return tokens


def test_sampled_text_survives_drafts_and_a_killed_worker(folder: str) -> None:
    async def test() -> None:
        engine = Engine(settings(folder))
        await engine.start()
        try:
            await engine.wait_ready()
            assert engine.info is not None
            assert engine.info.drafters == (PLAIN, *(name for name in MASKS if name != "ctc"))  # it needs a head
            plain = await asyncio.gather(*(collect(engine, sampled(index, "none")) for index in range(6)))
            drafted = await asyncio.gather(*(collect(engine, sampled(index, "trigram")) for index in range(6)))
            killed = await asyncio.gather(
                *(collect(engine, sampled(index, "trigram"), kill_after=9 if index == 1 else 99) for index in range(6))
            )
            assert engine.num_restarts == 1
            predicted = [
                msgspec.structs.replace(sampled(index, "suffix"), prediction=tuple(plain[index])) for index in range(6)
            ]
            copied = await asyncio.gather(
                *(collect(engine, one, kill_after=9 if one is predicted[2] else 99) for one in predicted)
            )
            assert engine.num_restarts == 2
        finally:
            await engine.close()
        assert all(len(tokens) == NUM_TOKENS for tokens in plain)
        assert len({tuple(tokens) for tokens in plain}) == len(plain)
        assert drafted == plain
        assert killed == plain
        assert copied == plain

    asyncio.run(test())


async def refusal(bad: Settings) -> str:
    engine = Engine(bad)
    await engine.start()
    try:
        with pytest.raises(StartupError) as caught:
            await engine.wait_ready()
    finally:
        await engine.close()
    assert engine.num_restarts == 0
    return str(caught.value)


def test_what_cannot_serve_is_one_clear_line(folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "many"}))
    cases = {
        "broken": settings(str(broken)),
        "max_num_batched_tokens": settings(folder, max_num_seqs=100, max_num_batched_tokens=64),
        "nonesuch": settings(folder, drafter="nonesuch"),
        "K/V pages": settings(folder, num_pages=3),
    }
    for word, bad in cases.items():
        line = asyncio.run(refusal(bad))
        assert word in line
        assert "\n" not in line, line
