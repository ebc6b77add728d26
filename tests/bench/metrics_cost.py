"""What the metrics cost against a step: 32 rows of a real model, with the calls that the API process makes for it.

    python -m tests.bench.metrics_cost --model FOLDER [--batch 32] [--nodes 16]

In process, one thread. The statistics of real steps are recorded, then observed again and again: `step_us` is
Metrics.observe_step with tokens_came for the tokens of every row, `tell_us` what the new fields add to an encoded and
decoded Outcome. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np

from server.config import Settings
from server.messages import FromWorker, Outcome, Speculation, StepStats, Submit, encode
from server.metrics import EngineState, Metrics, ServerFacts
from server.worker.main import load
from verifier.plan import SamplingParams

_NUM_TOKENS = 100
_REPEATS = 50
_NEW_FIELDS = {"drafted_by_depth": (), "drafters_s": {}, "decode_s": 0.0, "plain_s": 0.0, "drafter_bytes": None}


def record(options: argparse.Namespace) -> list[tuple[Outcome, StepStats, float]]:
    """Steps in which every row runs: what was told of them, and how long each took."""
    settings = Settings(model=options.model, drafter="trigram", max_num_seqs=options.batch, threads=1, compile=False)
    loop = load(settings).loop
    random = np.random.default_rng(0)
    for index in range(options.batch):
        prompt = tuple(random.integers(5, 200, 64).tolist())
        sampling = SamplingParams(max_tokens=_NUM_TOKENS, seed=index, temperature=0.0)
        loop.handle(Submit(str(index), prompt, sampling, Speculation("trigram", options.nodes), "tenant"))
    steps = []
    while loop.has_work:
        began = perf_counter()
        outcome = loop.step()
        step_s = perf_counter() - began
        stats = outcome.stats
        if stats is not None and not stats.num_chunk_tokens and stats.num_rows == options.batch:
            steps.append((outcome, stats, step_s))
    return steps


def observe_s(metrics: Metrics, steps: list[tuple[Outcome, StepStats, float]]) -> float:
    """Seconds to observe a step, with the tokens of all of its rows."""
    began = perf_counter()
    for outcome, stats, _ in steps:
        metrics.observe_step(stats)
        for delta in outcome.deltas:
            if delta.tokens:
                metrics.tokens_came(0.01, len(delta.tokens))
    return (perf_counter() - began) / len(steps)


def told_s(outcomes: list[Outcome]) -> float:
    """Seconds to encode and decode what a step tells."""
    decode = msgspec.msgpack.Decoder(FromWorker).decode
    began = perf_counter()
    for outcome in outcomes:
        decode(encode(outcome))
    return (perf_counter() - began) / len(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=16)
    options = parser.parse_args()
    steps = record(options)
    metrics = Metrics()
    metrics.describe(
        ServerFacts(
            version="0", model="m", drafter="trigram", max_rows=options.batch, page_size=16, has_vllm_aliases=True
        )
    )
    outcomes = [outcome for outcome, _, _ in steps]
    older = [
        msgspec.structs.replace(outcome, stats=msgspec.structs.replace(stats, **_NEW_FIELDS))
        for outcome, stats, _ in steps
    ]
    step_s = statistics.median(step_s for _, _, step_s in steps)
    cost_s = statistics.median(observe_s(metrics, steps) for _ in range(_REPEATS))
    tell_s = statistics.median(told_s(outcomes) - told_s(older) for _ in range(_REPEATS))
    began = perf_counter()
    metrics.sample_engine(EngineState(num_running=0, num_waiting=0, num_restarts=0, has_worker=True))
    scraped = metrics.render()
    result = {
        "bench": "metrics_cost",
        "model": Path(options.model).name,
        "batch": options.batch,
        "steps": len(steps),
        "step_ms": round(step_s * 1e3, 3),
        "metrics_us": round(cost_s * 1e6, 1),
        "tell_us": round(tell_s * 1e6, 1),
        "share": round((cost_s + max(0.0, tell_s)) / step_s, 5),
        "scrape_ms": round((perf_counter() - began) * 1e3, 2),
        "scrape_bytes": len(scraped),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
