"""The budget over a simulated server: what it chooses, what it learns, when it looks again, and that texts stay."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from server.worker.budget import Budget, Taken
from server.worker.cost import CostCurve, StepCost
from verifier.plan import Chunk, StepPlan, TreeSlot
from verifier.tree import DraftTrees

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def step_seconds(num_positions: int, base: float = 2.0, slope: float = 0.1) -> float:
    return base + slope * num_positions


def step_cost(base: float = 2.0, slope: float = 0.1) -> StepCost:
    return StepCost(CostCurve(SIZES, [step_seconds(size, base, slope) for size in SIZES], 512), 0.0)


@dataclass
class Server:
    """Rows that never end, whose drafter gives chains of true or wrong survivals. Owns a clock that only costs move."""

    survivals: list[float]
    """By row, the real chance that a node survives if its parent did."""
    said: list[float] | None = None
    """By row, what the drafter says it is; the truth if left out."""
    num_nodes: int = 8
    draft_s: tuple[float, float] = (0.3, 0.02)
    """For being asked, and for a tree of 8 nodes."""
    light: float | None = None
    """How good the drafter is on its light way: its survivals there are so many times the others."""
    light_s: tuple[float, float] = (0.02, 0.01)
    """What that costs."""
    base: float = 2.0
    slope: float = 0.1
    max_step_nodes: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.said = self.said or list(self.survivals)
        self.num_rows = len(self.survivals)
        self.budget = Budget(self.num_rows, ("d",), self.max_step_nodes, ("d",) if self.light is not None else ())
        self.budget.begin(step_cost(self.base, self.slope))
        for row in range(self.num_rows):
            self.budget.start(row, "d")
        self.trees = DraftTrees.allocate(self.num_rows)
        self.clock = 0.0
        self.num_won = 0
        self.drafted: list[list[int]] = []
        self.verified: list[int] = []
        self.is_asleep: list[bool] = []
        self.is_light: list[bool] = []

    def step(self, chunk: int = 0) -> None:
        rows = list(range(self.num_rows))
        most = [1 + self.num_nodes] * self.num_rows
        limits = self.budget.choose(rows, ["d"] * self.num_rows, most, self.num_rows)
        drafting = [row for row in rows if limits[row] > 1]
        assert len({memory >= self.num_rows for memory in self.budget._memories.tolist()}) == 1, "two ways in a step"
        is_light = "d" in self.budget.gears.light
        merit = self.light if is_light and self.light is not None else 1.0
        asking_s = self.light_s if is_light else self.draft_s
        self.trees.clear()
        assert self.said is not None
        for row in rows:
            size = limits[row]
            scores = [(merit * self.said[row]) ** node for node in range(size)]
            self.trees.append(list(range(size)), list(range(-1, size - 1)), scores, [0] + [4] * (size - 1))
        spent_s = asking_s[0] + asking_s[1] * sum(limits[row] for row in drafting) / 8 if drafting else 0.0
        chunks = (Chunk(self.num_rows, 0, (1,) * chunk, False),) if chunk else ()
        plan = StepPlan(trees=tuple(TreeSlot(row, 10, limits[row]) for row in rows), chunks=chunks)
        self.budget.cut(plan, self.trees, spent_s)
        sizes = np.diff(self.trees.row_starts[: self.num_rows + 1]).tolist()
        accepted = []
        for row in rows:
            won = 0
            while won < sizes[row] - 1 and self.rng.random() < merit * self.survivals[row]:
                won += 1
            accepted.append(won)
        step_s = step_seconds(self.trees.num_nodes + chunk, self.base, self.slope)
        self.budget.observe(plan, self.trees.num_nodes, accepted, Taken(step_s, {"d": spent_s} if drafting else {}))
        self.clock += step_s + spent_s
        self.num_won += self.num_rows + sum(accepted)
        self.drafted.append(drafting)
        self.verified.append(self.trees.num_nodes)
        self.is_light.append(is_light)
        self.is_asleep.append(bool(self.budget.gears.asleep))

    def run(self, num_steps: int) -> float:
        """Tokens per second of so many steps."""
        clock, num_won = self.clock, self.num_won
        for _ in range(num_steps):
            self.step()
        return (self.num_won - num_won) / (self.clock - clock)

    def rate_of(self, size: int, *, is_light: bool = False) -> float:
        """Expected tokens per second of drafting in every row with trees of `size` nodes; 1 is plain decoding."""
        merit = self.light if is_light and self.light is not None else 1.0
        fixed_s, tree_s = self.light_s if is_light else self.draft_s
        won = sum(sum((merit * survival) ** node for node in range(size)) for survival in self.survivals)
        spent_s = fixed_s + tree_s * self.num_rows * size / 8 if size > 1 else 0.0
        return won / (step_seconds(self.num_rows * size, self.base, self.slope) + spent_s)


@pytest.mark.parametrize("num_rows", [1, 4, 32])
@pytest.mark.parametrize("survival", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("slope", [0.001, 0.1, 1.0])
def test_it_is_about_as_fast_as_the_best_fixed_size(num_rows: int, survival: float, slope: float) -> None:
    server = Server([survival] * num_rows, slope=slope)
    server.run(50)
    rate = server.run(600)
    assert rate >= 0.93 * max(server.rate_of(size) for size in range(1, 10))
    assert rate >= 0.97 * server.rate_of(1)


def test_good_rows_draft_and_bad_ones_do_not() -> None:
    server = Server([0.9, 0.02, 0.9, 0.02], slope=0.5)
    server.run(100)
    server.drafted.clear()
    server.run(200)
    assert all({0, 2} <= set(drafting) for drafting in server.drafted)
    assert sum(1 in drafting for drafting in server.drafted) < 30


def test_what_a_drafter_overstates_is_corrected_by_what_was_accepted() -> None:
    server = Server([0.1] * 8, said=[0.95] * 8, slope=0.5)
    server.run(150)
    assert server.run(400) >= 0.96 * server.rate_of(1)


def test_what_a_drafter_understates_is_corrected_too() -> None:
    server = Server([0.9] * 4, said=[0.6] * 4, slope=0.25)
    server.run(200)
    assert server.run(400) >= 0.9 * max(server.rate_of(size) for size in range(1, 10))


def test_a_bypassed_row_is_looked_at_again_and_drafts_when_it_has_recovered() -> None:
    server = Server([0.02], slope=0.5)
    server.run(200)
    server.drafted.clear()
    server.run(600)
    assert 0 < sum(map(bool, server.drafted)) < 30
    server.survivals[0] = 0.9
    assert server.said is not None
    server.said[0] = 0.9
    server.run(600)
    server.drafted.clear()
    server.run(100)
    assert sum(map(bool, server.drafted)) > 95


def test_a_row_whose_drafter_was_wrong_about_it_recovers_as_well() -> None:
    server = Server([0.02], said=[0.9], slope=0.5)
    server.run(300)
    server.drafted.clear()
    server.run(300)
    assert sum(map(bool, server.drafted)) < 60
    server.survivals[0] = 0.9
    server.run(800)
    assert server.run(300) >= 0.9 * max(server.rate_of(size) for size in range(1, 10))


def test_looking_again_takes_a_small_part_of_the_time() -> None:
    server = Server([0.02] * 8, draft_s=(3.0, 0.3), slope=1.0)
    server.run(300)
    assert server.run(1000) >= 0.98 * server.rate_of(1)


def test_a_drafter_sleeps_while_nobody_drafts_and_wakes_one_step_before() -> None:
    server = Server([0.02] * 4, draft_s=(1.0, 0.1), slope=1.0)
    server.run(300)
    for index, drafting in enumerate(server.drafted):
        if drafting:
            assert not server.is_asleep[index]
            assert index == 0 or not server.is_asleep[index - 1] or index < 50
    assert sum(server.is_asleep[200:]) > 60
    assert not any(drafting and index > 50 and server.is_asleep[index - 1] for index, drafting in
                   enumerate(server.drafted))  # fmt: skip


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("light", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("draft_s", [0.1, 1.0, 5.0])
def test_of_two_ways_to_draft_it_goes_the_better_one(num_rows: int, light: float, draft_s: float) -> None:
    server = Server([0.85] * num_rows, light=light, draft_s=(draft_s, 0.02), slope=0.02)
    server.run(300)
    rate = server.run(1500)
    sizes = range(1, 10)
    best = max(max(server.rate_of(size), server.rate_of(size, is_light=True)) for size in sizes)
    assert rate >= 0.93 * best
    ratio = max(server.rate_of(size, is_light=True) for size in sizes) / max(server.rate_of(size) for size in sizes)
    if not 0.8 < ratio < 1.25:
        assert (np.mean(server.is_light[-1000:]) > 0.5) == (ratio > 1.0)


def test_it_goes_the_other_way_when_that_has_become_the_better_one() -> None:
    server = Server([0.9] * 4, light=0.3, draft_s=(0.5, 0.02), slope=0.05)
    server.run(600)
    assert np.mean(server.is_light[-300:]) < 0.1
    server.draft_s = (8.0, 0.02)
    server.light = 0.9
    server.run(1200)
    assert np.mean(server.is_light[-300:]) > 0.9
    server.draft_s = (0.5, 0.02)
    server.light = 0.3
    server.run(1200)
    assert np.mean(server.is_light[-300:]) < 0.1


def test_on_the_light_way_a_drafter_sleeps_and_wakes_one_step_before_it_is_asked_for_all() -> None:
    server = Server([0.9] * 4, light=0.95, draft_s=(4.0, 0.02), slope=0.05)
    server.run(2000)
    full = [index for index, is_light in enumerate(server.is_light) if not is_light and index > 300]
    assert full, "it never looked at what it knows in full"
    assert not any(server.is_asleep[index] or server.is_asleep[index - 1] for index in full)
    assert np.mean(server.is_asleep[300:]) > 0.9


def test_where_nothing_pays_both_ways_are_looked_at() -> None:
    server = Server([0.02] * 4, light=1.0, draft_s=(6.0, 0.1), light_s=(0.05, 0.01), slope=1.0)
    server.run(300)
    server.budget.ways.insist(None)  # it goes its full way, and stays there, as neither pays
    server.run(2500)
    probes = [server.is_light[index] for index, rows in enumerate(server.drafted) if rows and index > 300]
    assert any(probes)
    assert not all(probes)


@pytest.mark.parametrize("periods", [(8, 4), (4, 4), (8, 8), (4, 8)])
def test_neither_way_takes_all_turns_of_the_other(periods: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "_period", lambda _, way, *__: periods[way])
    server = Server([0.02] * 4, light=0.5, slope=1.0)
    server.run(200)
    server.budget.ways.insist(None)
    server.run(400)
    probes = [server.is_light[index] for index, rows in enumerate(server.drafted) if rows and index > 200]
    assert not all(probes), "what it knows in full was never asked for"
    assert any(probes), "what is cheap was never tried"


def test_on_its_light_way_a_drafter_sleeps_where_it_has_no_rows() -> None:
    budget = Budget(4, ("d", "e"), 0, ("d",))
    budget.begin(step_cost())
    for row, drafter in enumerate(("d", "e")):
        budget.start(row, drafter)
    budget.choose((), (), (), 0)
    assert not budget.gears.asleep
    budget.ways.turn(budget.ways.full["d"], budget.ways.light["d"])
    budget.choose((), (), (), 0)
    assert budget.gears.asleep == {"d"}, "a step of prompts only"
    budget.choose([1], ["e"], [8], 1)
    assert budget.gears.asleep == {"d"}, "a step of another drafter's rows"


def test_the_load_decides_who_drafts() -> None:
    """The same rows: alone it pays, together it does not."""
    busy, alone = Server([0.6] * 32, slope=0.2, base=1.0), Server([0.6], slope=0.2, base=1.0)
    busy.run(200)
    alone.run(200)
    assert sum(map(len, busy.drafted[100:])) < 0.2 * 32 * 100
    assert sum(map(len, alone.drafted[100:])) > 90


def test_max_step_nodes_bounds_the_trees_of_several_rows() -> None:
    server = Server([0.95] * 4, slope=0.001, max_step_nodes=12)
    server.run(50)
    assert max(server.verified) == 12
    single = Server([0.95], slope=0.001, max_step_nodes=4)
    single.run(50)
    assert max(single.verified) == 9, "a row that drafts alone is not held to it"


def test_beside_a_prompt_nodes_are_judged_by_what_they_add() -> None:
    """A long chunk makes the step long, which is no reason to verify what would not pay otherwise."""
    server = Server([0.5] * 4, slope=0.2)
    server.run(100)
    plain = server.verified[-50:]
    server.verified.clear()
    for _ in range(50):
        server.step(chunk=400)
    assert np.mean(server.verified) <= np.mean(plain) + 1
    assert np.mean(server.verified) >= np.mean(plain) - 1 > 5, "what pays alone pays beside a prompt"


def test_until_it_has_begun_it_says_nothing() -> None:
    budget = Budget(4, ("d",))
    assert not budget.is_ready
    budget.start(0, "d")
    assert budget.choose([0, 1], ["d", "d"], [7, 9], 2) == [7, 9]
    trees = DraftTrees.allocate(1)
    trees.append([1, 2], [-1, 0], [1.0, 0.0], [0, 4])
    plan = StepPlan(trees=(TreeSlot(0, 3, 2),))
    budget.cut(plan, trees, 0.1)
    assert trees.num_nodes == 2
    budget.observe(plan, 2, [0], Taken(1.0, {"d": 0.1}))
    assert budget.num_bypassed == 0
