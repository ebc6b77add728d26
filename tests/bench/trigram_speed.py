"""What drafting and learning cost on the host: microseconds per row and call, without a model.

Run: python -m tests.bench.trigram_speed [--drafter hybrid]. A synthetic corpus of 2 million tokens over 32,000 words
fills the table, so that look-ups miss the caches as they do in service. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from drafters import MASKS
from drafters.base import News, RowContext, Verified
from drafters.drafter import DrafterOptions, TreeDrafter
from drafters.ngram.source import NgramFiles
from training.ngram_table import BuildOptions, build_table
from verifier.tree import DraftTrees

_VOCAB = 32_000
_SHAPES = ((1, 8), (1, 16), (1, 64), (8, 16), (32, 8), (32, 16), (32, 64))
_STEPS = 60


def text(seed: int, documents: int, length: int = 1000) -> Iterator[list[int]]:
    """Documents in which each token has a few likely successors and many unlikely ones."""
    random = np.random.default_rng(seed)
    for _ in range(documents):
        ranks = random.zipf(1.5, length)
        tokens = [int(random.integers(_VOCAB))]
        for rank in ranks[1:].tolist():
            tokens.append((tokens[-1] * 7919 + min(rank, 1000) * 104_729) % _VOCAB)
        yield tokens


def measure(table: str, name: str, shape: tuple[int, int], temperature: float) -> dict[str, float]:
    """Medians over steps in which every row drafts and wins two tokens."""
    num_rows, max_nodes = shape
    drafter = TreeDrafter(DrafterOptions(vocab_size=_VOCAB, files=NgramFiles(table=table))).views()[name]
    known = list(text(1, num_rows))
    for row, tokens in enumerate(known):
        drafter.start(row, RowContext(f"tenant {row % 4}", tuple(tokens[:200]), 200, row, temperature))
    rows, sizes = np.arange(num_rows, dtype=np.int32), np.full(num_rows, max_nodes, np.int32)
    starts = np.arange(0, 2 * num_rows + 1, 2, dtype=np.int32)
    trees = DraftTrees.allocate(num_rows)
    random = np.random.default_rng(0)
    propose, read, nodes = [], [], 0
    for step in range(_STEPS):
        trees.clear()
        began = time.perf_counter()
        drafter.propose(rows, sizes, trees)
        propose.append(time.perf_counter() - began)
        nodes += trees.num_nodes
        size = (trees.num_nodes, drafter.num_candidates)
        candidates = random.integers(0, _VOCAB, size).astype(np.int32)
        logits = -np.sort(random.exponential(2.0, size)).astype(np.float32)
        won = np.array([token for tokens in known for token in tokens[200 + 2 * step : 202 + 2 * step]], np.int64)
        began = time.perf_counter()
        drafter.update(News(rows, starts, won, Verified(trees, 0, candidates, logits)))
        read.append(time.perf_counter() - began)
    return {
        "rows": num_rows,
        "max_nodes": max_nodes,
        "temperature": temperature,
        "nodes": round(nodes / _STEPS / num_rows, 1),
        "propose_us": round(statistics.median(propose[5:]) * 1e6, 1),
        "propose_us_per_row": round(statistics.median(propose[5:]) * 1e6 / num_rows, 1),
        "read_us": round(statistics.median(read[5:]) * 1e6, 1),
        "read_us_per_row": round(statistics.median(read[5:]) * 1e6 / num_rows, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--drafter", choices=[name for name in MASKS if name != "ctc"], default="trigram")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.tri"
        build = BuildOptions(out=out, tokenizer="synthetic")
        build_table(build, {"last": _VOCAB - 1}, text(0, 2000))
        measure(str(out), arguments.drafter, (1, 8), 0.0)  # compile
        print(f"table of {out.stat().st_size / 2**20:.0f} MiB, drafter {arguments.drafter}")
        print(f"{'rows':>5} {'nodes':>6} {'T':>4} {'propose us':>11} {'a row':>7} {'read us':>9} {'a row':>7}")
        found = []
        for shape in _SHAPES:
            for temperature in (0.0, 1.0):
                cell = measure(str(out), arguments.drafter, shape, temperature)
                found.append(cell)
                print(
                    f"{shape[0]:5d} {cell['nodes']:6.1f} {temperature:4.1f} {cell['propose_us']:11.1f} "
                    f"{cell['propose_us_per_row']:7.1f} {cell['read_us']:9.1f} {cell['read_us_per_row']:7.1f}",
                    flush=True,
                )
    print(json.dumps({"drafter": arguments.drafter, "cells": found}))


if __name__ == "__main__":
    main()
