"""Host time of a step outside the model's forward pass: plan, draft, pack, choose, walk, move, commit, encode.

    python -m tests.bench.host_step --model FOLDER [--table TABLE] [--batch 1 8 32] [--nodes 16] [--temperature 0]

In process, one thread, no sockets. Medians over the steps in which every row drafts, in milliseconds; `other` is what
no room counts (telling, encoding). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import numpy as np

from server.config import Settings
from server.messages import Speculation, Submit, frame
from server.worker.drafting import Effort
from server.worker.main import assemble
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams

_POSITIONS = 8192
_NUM_TOKENS = 150


def measure(options: argparse.Namespace, batch: int) -> dict[str, float]:
    """`batch` requests of 64 random prompt tokens, run together."""
    settings = Settings(
        model=options.model,
        trigram_table=options.table,
        max_num_seqs=batch,
        max_num_batched_tokens=_POSITIONS,
    )
    verifier = load_backend(
        VerifierOptions(model=options.model, device="cpu", threads=1, max_rows=batch, max_positions=_POSITIONS)
    )
    vocab_size = verifier.geometry.vocab_size
    loop = assemble(settings, verifier, verifier.geometry).loop
    loop.speculator.trial_effort = Effort.FULL
    random = np.random.default_rng(0)
    for index in range(batch):
        prompt = tuple(random.integers(5, vocab_size, 64).tolist())
        sampling = SamplingParams(
            max_tokens=_NUM_TOKENS, seed=index, temperature=options.temperature, top_p=options.top_p
        )
        loop.handle(Submit(str(index), prompt, sampling, Speculation("trigram", options.nodes), "tenant"))
    rooms: dict[str, list[float]] = {}
    while loop.has_work:
        began = perf_counter()
        outcome = loop.step()
        frame(outcome)
        total = perf_counter() - began
        stats = outcome.stats
        if stats is None or stats.num_chunk_tokens or stats.num_drafts < batch:
            continue
        times = {
            "forward": stats.forward_s,
            "host": total - stats.forward_s,
            "plan": stats.plan_s,
            "draft": stats.draft_s,
            "verify": stats.verify_s - stats.forward_s,
            "commit": stats.commit_s,
            "other": total - stats.plan_s - stats.draft_s - stats.verify_s - stats.commit_s,
        }
        for name, seconds in times.items():
            rooms.setdefault(name, []).append(seconds * 1e3)
        rooms.setdefault("nodes", []).append(stats.num_nodes)
        rooms.setdefault("won", []).append((stats.num_accepted + batch) / batch)
    if not rooms:
        raise SystemExit("no step in which every row drafted: give a --table")
    medians = {name: round(statistics.median(values), 3) for name, values in rooms.items()}
    return {"batch": batch, "steps": len(rooms["host"]), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--table", default="")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    options = parser.parse_args()
    measure(options, 1)  # compiles what is not compiled yet
    rows = [measure(options, batch) for batch in options.batch]
    print("  ".join(f"{name:>8}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:8.3f}" for value in row.values()))
    about = {"nodes": options.nodes, "temperature": options.temperature, "top_p": options.top_p}
    print(json.dumps({"bench": "host_step", "model": Path(options.model).name, **about, "rows": rows}))


if __name__ == "__main__":
    main()
