"""What copying costs on the host: microseconds per row and call, without a model.

Run: python -m tests.bench.suffix_speed. Texts of few words, so that the chains are as long as the walk;
in half of the cells each row also has a prediction that holds. Medians; the last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np

from drafters.base import News, RowContext
from drafters.drafter import DrafterOptions, TreeDrafter
from verifier.tree import DraftTrees

_STEPS = 100
_PROMPT = 4000


def measure(num_rows: int, max_nodes: int, has_prediction: bool) -> dict[str, float]:
    """Medians over steps in which every row drafts and wins two tokens."""
    random = np.random.default_rng(0)
    drafter = TreeDrafter(DrafterOptions(vocab_size=64)).views()["suffix"]
    known = (random.zipf(1.3, (num_rows, _PROMPT + 2 * _STEPS)) % 50).astype(np.int64)
    for row in range(num_rows):
        prompt, answer = known[row, :_PROMPT].tolist(), known[row, _PROMPT:].tolist()
        prediction = tuple(answer) if has_prediction else ()
        drafter.start(row, RowContext("", tuple(prompt), _PROMPT, row, 0.0, (60, 61), prediction))
    rows, sizes = np.arange(num_rows, dtype=np.int32), np.full(num_rows, max_nodes, np.int32)
    starts = np.arange(0, 2 * num_rows + 1, 2, dtype=np.int32)
    trees = DraftTrees.allocate(num_rows)
    propose, read, nodes = [], [], 0
    for step in range(_STEPS):
        trees.clear()
        began = time.perf_counter()
        drafter.propose(rows, sizes, trees)
        propose.append(time.perf_counter() - began)
        nodes += trees.num_nodes
        won = known[:, _PROMPT + 2 * step : _PROMPT + 2 * step + 2].ravel()
        began = time.perf_counter()
        drafter.update(News(rows, starts, won))
        read.append(time.perf_counter() - began)
    return {
        "rows": num_rows,
        "max_nodes": max_nodes,
        "has_prediction": has_prediction,
        "nodes": round(nodes / _STEPS / num_rows, 1),
        "propose_us_per_row": round(statistics.median(propose[5:]) * 1e6 / num_rows, 2),
        "read_us_per_row": round(statistics.median(read[5:]) * 1e6 / num_rows, 2),
    }


def main() -> None:
    measure(1, 8, True)  # compile
    print(f"{'rows':>5} {'limit':>6} {'prediction':>11} {'nodes':>6} {'propose us a row':>17} {'read us a row':>14}")
    cells = []
    for num_rows, max_nodes in ((1, 8), (1, 16), (1, 64), (32, 16), (32, 64)):
        for has_prediction in (False, True):
            cell = measure(num_rows, max_nodes, has_prediction)
            cells.append(cell)
            print(
                f"{num_rows:5d} {max_nodes:6d} {'yes' if has_prediction else 'no':>11} {cell['nodes']:6.1f} "
                f"{cell['propose_us_per_row']:17.2f} {cell['read_us_per_row']:14.2f}"
            )
    print(json.dumps({"cells": cells}))


if __name__ == "__main__":
    main()
