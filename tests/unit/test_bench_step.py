"""The step benchmark's own machinery: every arm makes the same step, again and again, and its numbers add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.bench.cpu_step import OURS, Record, summary
from tests.bench.step_arms import Draft, Ours, make_draft, theirs_eager
from tests.families import VOCAB, save_model
from verifier.options import VerifierOptions
from verifier.tree import DraftTrees

PROMPT = np.random.default_rng(0).integers(3, VOCAB, 20).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("model"))


def _ours(folder: str, name: str) -> Ours:
    options = VerifierOptions(
        model=folder, dtype="float32", device="cpu", threads=1, max_rows=1, max_model_len=128, **OURS[name]
    )
    return Ours(name, options, PROMPT)


@pytest.mark.parametrize("name", ["plain", "quick"])
def test_arms_win_the_same_again_and_again(folder: str, name: str) -> None:
    ours, theirs = _ours(folder, name), theirs_eager(folder, torch.float32, PROMPT)
    truth = ours.decode(6)
    for kind, size in [("chain", 1), ("chain", 8), ("tree", 8), ("tree", 20), ("chain", 3)] * 2:
        draft = make_draft(kind, size, truth, np.random.default_rng(size), VOCAB)
        won = []
        for arm in (ours, theirs):
            arm.prepare(draft)
            result = arm.step()
            arm.restore(draft)
            won.append(arm.won(draft, result))
        hits = min(size - 1, 4) if kind == "chain" else min(size // 2, 4)
        assert won[0] == won[1] == truth[1 : hits + 2], (kind, size)


@pytest.mark.parametrize("kind", ["chain", "tree"])
@pytest.mark.parametrize("size", [1, 2, 3, 9, 64])
def test_drafts_are_trees(kind: str, size: int) -> None:
    draft = make_draft(kind, size, [5, 5, 5, 5, 6, 7], np.random.default_rng(0), VOCAB)
    draft.fill(DraftTrees.allocate(1)).check()
    assert draft.size == size


def test_true_nodes_of_a_tree_have_to_move() -> None:
    draft: Draft = make_draft("tree", 12, [5, 6, 7, 8, 9, 10], np.random.default_rng(0), VOCAB)
    places = [draft.tokens.index(token) for token in (6, 7, 8, 9)]
    assert places == [2, 4, 6, 8]


def test_ratios() -> None:
    record = Record()
    record.times = {"ours": {"1": [0.002, 0.002], "8": [0.003, 0.003]}, "tf-eager": {"1": [0.004], "8": [0.006]}}
    table = summary(record, ["1", "8"])
    assert table["ours"]["1"] == {"ms": 2.0, "min_ms": 2.0, "steps": 2, "x_tf": 2.0, "x_1": 1.0}
    assert table["ours"]["8"]["x_1"] == 1.5
    assert table["tf-eager"]["8"]["x_tf"] == 1.0
