"""What rows are worth: factors, memory, and what newcomers inherit."""

from __future__ import annotations

import numpy as np
import pytest

from server.worker.admission import bin_of
from server.worker.worth import ASKED, PROBED, REFUSED, Worth

ROWS = np.array([0, 1], np.int32)


def learn(
    worth: Worth,
    survivals: list[list[float]],
    accepted: list[float],
    expected: list[float],
    reasons: tuple[int, ...] = (ASKED, ASKED),
) -> None:
    """A step in which rows 0, 1, ... drafted nodes of these survivals."""
    starts = np.cumsum([0, *(1 + len(tree) for tree in survivals)]).astype(np.int32)
    packed = np.array([one for tree in survivals for one in (1.0, *tree)])
    rows = np.arange(len(survivals), dtype=np.int32)
    drafted = (rows, np.array(reasons[: len(survivals)], np.int32), starts, packed)
    worth.learn(drafted, np.array(accepted, np.float64), np.array(expected, np.float64))


def started() -> Worth:
    worth = Worth(4, 2)
    for row in range(4):
        worth.start(row, row // 2)
    return worth


def test_a_newcomer_is_hoped_for_until_its_drafter_is_known() -> None:
    worth = started()
    counts, sums = worth.of(ROWS)
    assert counts.sum(1).tolist() == [6.0, 6.0]
    assert sums.sum(1) == pytest.approx([4.8, 4.8])
    for _ in range(300):
        learn(worth, [[0.5, 0.1], [0.5, 0.1]], [0.6, 0.6], [0.6, 0.6])
    worth.start(1, 0)
    worth.start(2, 1)
    counts, sums = worth.of(np.array([1, 2], np.int32))
    assert counts.sum(1) == pytest.approx([2.0, 6.0], rel=0.01)
    assert sums.sum(1) == pytest.approx([0.6, 4.8], rel=0.02)
    assert counts[0, bin_of(0.5)] == pytest.approx(1.0, rel=0.01)


def test_good_and_bad_trees_are_not_mixed_to_middling_ones() -> None:
    worth = started()
    for step in range(300):
        learn(worth, [[0.9] if step % 2 else [0.1]], [0.5], [0.5])
    counts, _ = worth.of(ROWS[:1])
    assert counts[0, bin_of(0.9)] == pytest.approx(0.5, abs=0.06)
    assert counts[0, bin_of(0.5)] == pytest.approx(0.0, abs=0.01)


def test_the_factor_is_accepted_over_expected() -> None:
    worth = started()
    assert worth.factors(ROWS).tolist() == [1.0, 1.0]
    for _ in range(200):
        learn(worth, [[0.8] * 4, [0.4] * 4], [0.8, 2.4], [1.6, 1.6])
    low, high = worth.factors(ROWS).tolist()
    assert low == pytest.approx(0.55, abs=0.06)
    assert high == pytest.approx(1.45, abs=0.06)
    assert worth.factors(np.array([2], np.int32)).tolist() == [1.0], "another drafter"
    worth.start(0, 0)
    assert worth.factors(ROWS)[0] == pytest.approx(1.0, abs=0.05), "what its drafter is on the whole"
    counts, _ = worth.of(np.array([1], np.int32))
    assert counts[0, bin_of(0.58)] == pytest.approx(4.0, rel=0.05), "survivals are counted as corrected"


def test_the_memory_of_a_row_that_only_probes_fades() -> None:
    worth = started()
    for _ in range(100):
        learn(worth, [[0.9] * 4, [0.9] * 4], [0.0, 0.0], [3.0, 3.0])
    low = float(worth.factors(ROWS)[0])
    assert low < 0.2
    for _ in range(20):
        learn(worth, [[0.9] * 4, [0.9] * 4], [0.0, 0.0], [0.0, 0.0], (PROBED, PROBED))
    assert float(worth.factors(ROWS)[0]) > 0.6


def test_a_row_that_did_not_draft_learns_nothing() -> None:
    worth = started()
    before = [array.copy() for array in (*worth.of(ROWS), worth.factors(ROWS))]
    learn(worth, [[], []], [0.0, 0.0], [0.0, 0.0], (REFUSED, REFUSED))
    assert all(np.array_equal(a, b) for a, b in zip(before, (*worth.of(ROWS), worth.factors(ROWS)), strict=True))
