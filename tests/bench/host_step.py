"""Host time of the rooms around the model: plan, hand trees over, commit, count, tell. No model, no real drafter.

Run: python -m tests.bench.host_step. Prints a table and ends with one JSON line; times are medians in microseconds.
"""

from __future__ import annotations

import json
import statistics
from time import perf_counter

import numpy as np

from drafters.base import Drafter, Int32, News, RowContext, Source
from server.messages import StepStats, frame
from server.worker.drafting import Drafting
from server.worker.loop import Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from tests.fakes import submit_of
from verifier.plan import StepPlan
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

_NODES = 16
_ACCEPTED = 3
_STEPS = 400


class ChainDrafter(Drafter):
    """Fills chains of one shape straight into the arrays: the least a drafter can cost."""

    max_depth = _NODES - 1
    num_candidates = 4

    def start(self, row: int, context: RowContext) -> None:
        pass

    def read(self, news: News) -> None:
        pass

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        sizes = np.minimum(max_nodes, _NODES)
        starts = out.num_nodes + np.concatenate([[0], np.cumsum(sizes)])
        first = out.num_rows
        for row in range(len(rows)):
            nodes = slice(int(starts[row]), int(starts[row + 1]))
            size = nodes.stop - nodes.start
            out.tokens[nodes] = 5
            out.depths[nodes] = np.arange(size)
            out.parents[nodes] = np.arange(-1, size - 1)
            out.ancestors[nodes] = (1 << np.arange(1, size + 1, dtype=np.int64)) - 1
            out.sources[nodes] = Source.OTHER
        out.num_rows = first + len(rows)
        out.row_starts[first : out.num_rows + 1] = starts


class CannedVerifier:
    """Accepts the same number of drafts of every tree, in no time."""

    def run(self, plan: StepPlan, trees: DraftTrees, num_candidates: int) -> Verdict:
        rows = [slot.row for slot in plan.trees] + [chunk.row for chunk in plan.chunks if chunk.is_last]
        accepted = np.zeros(len(rows), np.int32)
        accepted[: len(plan.trees)] = np.minimum(_ACCEPTED, np.diff(trees.row_starts[: trees.num_rows + 1]) - 1)
        num_nodes = trees.num_nodes
        return Verdict(
            rows=np.array(rows, np.int32),
            tokens=np.full((len(rows), _ACCEPTED + 1), 5, np.int64),
            num_accepted=accepted,
            nodes=np.tile(np.arange(1, _ACCEPTED + 1, dtype=np.int32), (len(rows), 1)),
            candidates=np.zeros((num_nodes, num_candidates), np.int32) if num_candidates else None,
            candidate_logits=np.zeros((num_nodes, num_candidates), np.float32) if num_candidates else None,
        )


def measure(num_rows: int, drafter: str) -> dict[str, float]:
    """Medians over steps in which every row decodes."""
    limits = Limits(max_rows=num_rows, max_batched_tokens=2048, max_model_len=4096, num_pages=20_000, page_size=16)
    drafting = Drafting({"chain": ChainDrafter()}, max_rows=num_rows, vocab_size=1000)
    loop = Loop(CannedVerifier(), Scheduler(limits), drafting, 1000)
    for row in range(num_rows):
        loop.handle(submit_of([1, 2, row], f"r{row}", drafter=drafter, max_nodes=_NODES, max_tokens=4000))
    stats: list[StepStats] = []
    whole: list[float] = []
    loop.step()
    for _ in range(_STEPS):
        began = perf_counter()
        outcome = loop.step()
        frame(outcome)
        whole.append(perf_counter() - began)
        assert outcome.stats is not None
        stats.append(outcome.stats)
    rooms = {
        name: statistics.median(getattr(one, f"{name}_s") for one in stats) for name in ("plan", "draft", "commit")
    }
    return {name: round(1e6 * value, 1) for name, value in (*rooms.items(), ("step", statistics.median(whole)))}


def main() -> None:
    results = []
    print(f"{'rows':>5} {'drafter':>8} {'plan':>8} {'draft':>8} {'commit':>8} {'step':>8}   microseconds")
    for num_rows in (1, 8, 32):
        for drafter in ("none", "chain"):
            found = measure(num_rows, drafter)
            results.append({"rows": num_rows, "drafter": drafter, **found})
            print(f"{num_rows:>5} {drafter:>8} " + " ".join(f"{value:>8}" for value in found.values()))
    print(json.dumps({"bench": "host_step", "unit": "us", "results": results}))


if __name__ == "__main__":
    main()
