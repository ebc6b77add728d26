"""The cost curve: monotone, straight between its points, corrected by what is observed, deaf to outliers."""

from __future__ import annotations

import numpy as np
import pytest

from server.worker.cost import CostCurve, Sample, StepCost


def curve() -> CostCurve:
    return CostCurve([1, 2, 4, 8, 16], [1.0, 1.1, 1.3, 1.7, 2.5], 64)


def test_between_points_it_is_straight_and_beyond_them_it_goes_on() -> None:
    table = curve().table
    assert table.shape == (65,)
    assert table[[1, 2, 3, 4, 6, 16]] == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.5, 2.5])
    assert table[64] == pytest.approx(2.5 + 48 * 0.1)
    assert [curve().at(size) for size in (0.5, 1, 3.5, 64, 100)] == pytest.approx([1.0, 1.0, 1.25, 7.3, 10.9])


def test_it_never_falls_whatever_was_measured_or_observed() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = CostCurve([1, 2, 4, 8, 16], rng.random(5).tolist(), 40)
        for _ in range(60):
            one.observe(int(rng.integers(1, 50)), float(rng.random() + 1e-4))
            assert (np.diff(one.table) >= 0).all()
            assert (one.table > 0).all()


def test_observations_win_over_what_was_measured_at_the_start() -> None:
    one = curve()
    for _ in range(300):
        for size in (1, 3, 8, 16):
            one.observe(size, 2.0 * float(curve().table[size]))
    assert one.table[[1, 3, 8, 16]] == pytest.approx(2.0 * curve().table[[1, 3, 8, 16]], rel=0.02)
    assert one.table[2] == pytest.approx(2.0 * curve().table[2], rel=0.05)


def test_a_size_class_is_corrected_without_those_far_away() -> None:
    one = curve()
    for _ in range(200):
        one.observe(16, 5.0)
        one.observe(1, 1.0)
    assert one.table[16] == pytest.approx(5.0, rel=0.05)
    assert one.table[1] == pytest.approx(1.0, rel=0.05)


def test_one_step_in_ten_that_takes_ages_moves_it_little() -> None:
    one, rng = curve(), np.random.default_rng(1)
    for _ in range(2000):
        size = int(rng.integers(1, 17))
        slowed = 100.0 if rng.random() < 0.1 else 1.0
        one.observe(size, slowed * float(curve().table[size]) * float(rng.uniform(0.97, 1.03)))
    assert one.table[1:17] == pytest.approx(curve().table[1:17], rel=0.12)


def test_an_unknown_curve_is_free_and_learns_at_once() -> None:
    one = CostCurve.unknown(8)
    assert one.at(8) < 1e-6
    one.observe(1, 2.0)
    assert [one.at(size) for size in (1, 2, 8)] == pytest.approx([2.0, 3.0, 9.0]), "half of it for being asked at all"
    for _ in range(40):
        one.observe(8, 6.0)
        one.observe(1, 2.0)
    assert [one.at(size) for size in (1, 8)] == pytest.approx([2.0, 6.0], rel=0.1)
    assert one.at(2) <= one.at(5) <= one.at(8) <= one.at(100)


def test_what_rows_cost_is_told_from_what_positions_cost() -> None:
    def seconds(num_positions: int, num_rows: int) -> float:
        return 1.0 + 0.1 * num_positions + 0.02 * (num_rows - 1)

    sizes = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (64, 1), (8, 8), (16, 8), (64, 8), (128, 8), (32, 32), (512, 32)]
    cost = StepCost.fit([Sample(n, r, seconds(n, r)) for n, r in sizes], 600)
    assert cost.row_s == pytest.approx(0.02)
    assert cost.positions.table[[1, 3, 64, 128, 300, 512]] == pytest.approx(
        [seconds(size, 1) for size in (1, 3, 64, 128, 300, 512)]
    )


def test_rows_never_cost_less_than_nothing() -> None:
    cost = StepCost.fit([Sample(1, 1, 1.0), Sample(8, 1, 2.0), Sample(8, 8, 1.5)], 16)
    assert cost.row_s == 0.0


def test_a_step_that_was_disturbed_while_it_was_measured_lifts_no_other() -> None:
    times = [(1, 1.0), (2, 9.0), (4, 1.4), (8, 1.8)]
    cost = StepCost.fit([Sample(size, 1, seconds) for size, seconds in times], 16)
    assert cost.positions.table[[1, 2, 4, 8]] == pytest.approx([1.0, 1.4, 1.4, 1.8])
