"""The speculator over a simulated server: what it chooses, what it learns, and that it always comes back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from drafters.base import RowContext
from server.worker.drafting import Drafting, Effort
from server.worker.speculator import Speculator
from server.worker.step_cost import DraftSample, Profile, StepCost, StepSample
from verifier.plan import NOTHING, Chunk, StepPlan, TreeSlot, Wanted
from verifier.verdict import Verdict

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SLOW_S = 0.002
Bools = NDArray[np.bool_]
Noise = Callable[[int], float]
"""Factor on the seconds of a step, by its positions."""


def quiet(size: int) -> float:
    return 1.0


class Guesses(Drafting):
    """Guesses chains whose nodes come true with a chance of their own; what they say of it may be wrong."""

    def __init__(self, server: Server) -> None:
        super().__init__({}, max_rows=server.num_rows + server.num_bare, vocab_size=100)
        self.server = server
        self.proposed: list[Effort] = []

    @property
    def names(self) -> tuple[str, ...]:
        return ("none", "d")

    def has_full(self, rows: Sequence[int]) -> bool:
        return self.server.full is not None

    def start(self, row: int, name: str, context: RowContext) -> None:
        pass

    def propose(self, slots: Sequence[TreeSlot], roots: Sequence[int], effort: Effort = Effort.FULL) -> None:
        self.trees.clear()
        self.proposed.append(effort)
        is_asked = False
        for slot in slots:
            said = self.server.said(slot.row, effort) or 0.5
            size = min(slot.max_nodes, self.server.num_nodes)
            is_asked |= slot.max_nodes > 1
            self._append_chain(size, said, self.server.luck[slot.row] < self.server.chance(slot.row, effort))
        if is_asked:
            self.spent_s["d"] = self.spent_s.get("d", 0.0) + self.server.draft_s[effort] * self.server.noise(1)

    def _append_chain(self, size: int, said: float, is_right: Bools) -> None:
        trees, start = self.trees, self.trees.num_nodes
        nodes = np.arange(size)
        span = slice(start, start + size)
        trees.tokens[span] = np.where(is_right[:size], nodes, 50)  # the true text is 0, 1, 2, ...
        trees.tokens[start], trees.parents[span], trees.depths[span] = 0, nodes - 1, nodes
        trees.ancestors[span], trees.scores[span] = 2 ** (nodes + 1) - 1, said**nodes
        trees.sources[span] = nodes > 0
        trees.num_rows += 1
        trees.row_starts[trees.num_rows] = start + size

    def wanted(self, plan: StepPlan) -> Wanted:
        return NOTHING

    def update(self, plan: StepPlan, verdict: Verdict, kept: Sequence[int]) -> None:
        pass


@dataclass
class Server:
    """Rows that never end. Owns a clock that only costs move."""

    cheap: list[float]
    """By row, the chance that a node of a cheap draft comes true if its parent did."""
    full: float | None = None
    """With full effort it is so much higher."""
    optimism: float = 1.0
    """What cheap drafts say of their chances, as a factor."""
    full_optimism: float = 0.0
    """The same with full effort; 0 for as much."""
    num_bare: int = 0
    """Rows beside these that may not draft."""
    num_nodes: int = 24
    draft_s: dict[Effort, float] = field(
        default_factory=lambda: {Effort.NONE: 0.0, Effort.CHEAP: 2e-5, Effort.FULL: 3e-4}
    )
    base_s: float = 0.002
    slope_s: float = 1e-4
    seed: int = 0
    noise: Noise = quiet
    start_noise: Callable[[int], float] = quiet

    def __post_init__(self) -> None:
        self.rng, self.draws = random.Random(self.seed), np.random.default_rng(self.seed)
        self.num_rows = len(self.cheap)
        self.drafting = Guesses(self)
        self.speculator = Speculator(self.drafting, self.num_rows + self.num_bare)
        steps = tuple(StepSample(size, 1, self.quiet_s(size) * self.start_noise(size)) for size in SIZES)
        drafts = tuple(
            DraftSample(effort, rows, self.draft_s[effort] * self.start_noise(1))
            for effort in (Effort.CHEAP, Effort.FULL)
            for rows in (1, 8)
        )
        self.speculator.begin(StepCost(Profile(steps, drafts), SIZES[-1]))
        for row in range(self.num_rows + self.num_bare):
            self.speculator.start(row, "d", RowContext("", (), 0, 0, 0.0))
        self.clock, self.num_won = 0.0, 0
        self.expected, self.expected_s = 0.0, 0.0
        self.verified: list[int] = []
        self.efforts: list[Effort] = []

    def quiet_s(self, size: int) -> float:
        return self.base_s + self.slope_s * size

    def chance(self, row: int, effort: Effort) -> float:
        if row >= self.num_rows:
            return 0.0
        return min(0.98, self.cheap[row] * (self.full if effort is Effort.FULL and self.full else 1.0))

    def said(self, row: int, effort: Effort) -> float:
        optimism = self.full_optimism if effort is Effort.FULL and self.full_optimism else self.optimism
        return min(1.0, optimism * self.chance(row, effort))

    def step(self, chunk: int = 0) -> None:
        rows = list(range(self.num_rows))
        num_trees = self.num_rows + self.num_bare
        self.luck = self.draws.random((num_trees, self.num_nodes + 1))  # by row and depth
        limits = self.speculator.choose(rows, [64] * self.num_rows, num_trees, chunk > 0) + [1] * self.num_bare
        rows = list(range(num_trees))
        chunks = (Chunk(self.num_rows + self.num_bare, 0, (1,) * chunk, False),) if chunk else ()
        plan = StepPlan(trees=tuple(TreeSlot(row, 10, limits[row]) for row in rows), chunks=chunks)
        trees = self.speculator.draft(plan, [0] * num_trees, lambda trees: None)
        sizes = np.diff(trees.row_starts[: trees.num_rows + 1]).tolist()
        effort = self.speculator.effort
        kept = []
        for row, tree in enumerate(np.split(trees.tokens[: trees.num_nodes], np.cumsum(sizes)[:-1])):
            is_wrong = tree != np.arange(sizes[row])
            kept.append(int(is_wrong.argmax()) if is_wrong.any() else sizes[row])
        tokens = np.tile(np.arange(1, max(sizes) + 1), (num_trees, 1))
        verdict = Verdict(
            np.array(rows, np.int32), tokens, np.array(kept, np.int32) - 1, np.zeros(tokens.shape, np.int32)
        )
        self.speculator.update(plan, verdict, kept)
        size = trees.num_nodes + chunk
        step_s = self.quiet_s(size) * self.noise(size) * self.rng.uniform(0.97, 1.04)
        drafting_s = sum(self.drafting.spent_s.values())
        self.speculator.observe(plan, trees.num_nodes, step_s, drafting_s)
        self.clock += step_s + drafting_s
        self.expected_s += self.quiet_s(size) + (drafting_s / self.noise(1))
        self.expected += sum(self.chance(row, effort) ** node for row in rows for node in range(sizes[row]))
        self.num_won += sum(kept)
        self.verified.append(trees.num_nodes)
        self.efforts.append(effort)

    def run(self, num_steps: int) -> float:
        """Tokens per second of so many steps."""
        clock, num_won = self.clock, self.num_won
        for _ in range(num_steps):
            self.step()
        return (self.num_won - num_won) / (self.clock - clock)

    def expect(self, num_steps: int) -> float:
        """Tokens per second to be expected of the choices of so many steps, on a quiet machine."""
        expected, expected_s = self.expected, self.expected_s
        self.run(num_steps)
        return (self.expected - expected) / (self.expected_s - expected_s)

    def rate_of(self, size: int, effort: Effort = Effort.CHEAP) -> float:
        """Expected tokens per second of drafting in every row with trees of `size` nodes; 1 is plain decoding."""
        won = sum(sum(self.chance(row, effort) ** node for node in range(size)) for row in range(self.num_rows))
        spent_s = self.draft_s[effort] if size > 1 else 0.0
        return (won + self.num_bare) / (self.quiet_s(self.num_rows * size + self.num_bare) + spent_s)

    def best_rate(self) -> float:
        efforts = [Effort.CHEAP] if self.full is None else [Effort.CHEAP, Effort.FULL]
        return max(self.rate_of(size, effort) for size in range(1, 24) for effort in efforts)


@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("chance", [0.02, 0.6, 0.9])
@pytest.mark.parametrize("slope_s", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("optimism", [0.7, 1.5])
def test_it_is_about_as_fast_as_the_best_fixed_size(
    num_rows: int, chance: float, slope_s: float, optimism: float
) -> None:
    server = Server([chance] * num_rows, slope_s=slope_s, optimism=optimism)
    server.run(60)
    assert server.expect(100) >= 0.93 * server.best_rate()


@pytest.mark.parametrize(("full", "draft_s", "is_full"), [(1.3, 1e-4, True), (1.02, 1e-3, False), (1.0, 1e-4, False)])
def test_full_effort_is_chosen_where_it_pays(full: float, draft_s: float, is_full: bool) -> None:
    server = Server([0.6], full=full, draft_s={Effort.NONE: 0.0, Effort.CHEAP: 2e-5, Effort.FULL: draft_s})
    server.run(100)
    server.efforts.clear()
    server.run(200)
    assert (server.efforts.count(Effort.FULL) > 150) is is_full
    assert server.efforts.count(Effort.FULL) > 1, "it is looked at now and then"


@pytest.mark.parametrize(("cheap", "full_optimism", "optimism"), [(0.5, 0.6, 1.0), (0.5, 1.0, 1.6), (0.5, 1.6, 0.6)])
def test_how_honest_one_effort_is_says_nothing_of_the_other(
    cheap: float, full_optimism: float, optimism: float
) -> None:
    server = Server([cheap], full=1.7, full_optimism=full_optimism, optimism=optimism)
    server.run(300)
    assert server.expect(300) >= 0.9 * server.best_rate()


@pytest.mark.parametrize("num_bare", [3, 31])
def test_rows_that_cannot_draft_do_not_keep_others_from_it(num_bare: int) -> None:
    server = Server([0.9], num_bare=num_bare)
    server.run(100)
    first = len(server.verified)
    assert server.expect(300) >= 0.93 * server.best_rate()
    idle = sum(size == server.num_rows + num_bare for size in server.verified[first:])
    assert idle <= 0.05 * 300


def test_a_row_that_drafts_well_beside_rows_that_do_not_gets_the_nodes() -> None:
    server = Server([0.05] * 7 + [0.9])
    server.run(60)
    server.step()
    sizes = np.diff(server.drafting.trees.row_starts[:9])
    assert sizes[7] > 4
    assert sizes[:7].max() <= 2


def test_drafting_that_never_pays_costs_little() -> None:
    server = Server([0.01] * 4, draft_s={Effort.NONE: 0.0, Effort.CHEAP: 2e-3, Effort.FULL: 0.0})
    server.run(100)
    server.efforts.clear()
    assert server.expect(400) >= 0.95 * server.rate_of(1)
    gaps = np.diff(np.flatnonzero(np.array(server.efforts) > 0))
    assert gaps.max() <= 64, "it looks again, whatever a look costs"


def test_it_comes_back_when_drafts_become_right() -> None:
    server = Server([0.01])
    server.run(500)
    assert server.expect(64) <= 1.05 * server.rate_of(1)
    server.cheap[0] = 0.8
    server.run(100)
    assert server.expect(64) >= 0.85 * server.best_rate()


@pytest.mark.parametrize("factor", [10.0, 30.0])
def test_full_effort_comes_back_when_drafting_is_quick_again(factor: float) -> None:
    """One look must do: looks at what is dear are 64 steps apart."""
    shares = []
    for seed in range(4):
        server = Server([0.6], full=1.3, seed=seed)
        server.run(200)
        quick = dict(server.draft_s)
        server.draft_s = {effort: factor * seconds for effort, seconds in quick.items()}
        server.run(300)
        server.draft_s = quick
        server.run(100)
        shares.append(server.expect(50) / server.best_rate())
    assert np.mean(shares) >= 0.94


def test_full_effort_comes_back_when_its_drafts_become_right() -> None:
    server = Server([0.01], full=1.3)
    server.run(1000)
    server.cheap[0] = 0.6
    server.run(50)
    assert server.expect(50) >= 0.94 * server.best_rate()


# ---- what holds on a machine that others use


def neighbour(rng: random.Random) -> Noise:
    """A program beside the server: steps take up to 30 times as long, large ones more so, some much longer."""
    common, jitter = math.exp(rng.uniform(0.0, math.log(30.0))), rng.uniform(0.0, 0.5)
    growth, outliers = rng.choice([0.0, 0.0, rng.uniform(0.0, 1.5)]), rng.choice([0.0, rng.uniform(0.0, 0.3)])

    def noise(size: int) -> float:
        factor = common * size**growth * math.exp(rng.gauss(0.0, jitter))
        return factor * rng.uniform(2.0, 50.0) if rng.random() < outliers else factor

    return noise


def left_alone(seed: int) -> Server:
    """A server that was started and used beside a neighbour, 50 steps after that ended."""
    rng = random.Random(seed)
    noise = neighbour(rng)
    has_start, has_use = rng.choice([(True, True), (True, False), (False, True)])
    server = Server(
        cheap=[rng.uniform(0.5, 0.85)] * rng.choice([1, 1, 1, 2, 4]),
        slope_s=rng.choice([1e-5, 5e-5, 1e-4]),
        full=rng.choice([None, 1.0, 1.15]),
        seed=seed,
        start_noise=(lambda size: min(noise(size) for _ in range(3))) if has_start else quiet,
        noise=noise if has_use else quiet,
    )
    server.run(rng.choice([10, 20, 60]))
    server.noise = quiet
    server.run(50)
    return server


def test_no_neighbour_leaves_it_without_drafts() -> None:
    """Drafting pays in all of these, so a server that does not draft, or hardly, has been misled for good."""
    shares = []
    for seed in range(1000):
        server = left_alone(seed)
        first = len(server.verified)
        shares.append(server.expect(16) / server.best_rate())
        drafting = sum(size > server.num_rows for size in server.verified[first:])
        assert drafting >= 8, f"seed {seed}: hardly a draft"
    assert np.quantile(shares, 0.02) >= 0.6
    assert np.quantile(shares, 0.05) >= 0.8
    assert np.median(shares) >= 0.95


@pytest.mark.parametrize("factor", [1 / 3, 30.0])
def test_a_machine_that_changes_speed_for_good_changes_no_choice(factor: float) -> None:
    server = Server([0.7])
    server.run(100)
    server.noise = lambda size: factor
    server.run(50)
    first = len(server.verified)
    assert server.expect(100) >= 0.93 * server.best_rate()
    assert server.speculator.cost is not None
    assert server.speculator.cost.scale == pytest.approx(factor, rel=0.3)
    assert np.median(server.verified[first:]) > 2


def test_outliers_change_no_choice() -> None:
    server = Server([0.7])
    server.run(100)
    server.noise = lambda size: 40.0 if server.rng.random() < 0.1 else 1.0
    assert server.expect(200) >= 0.93 * server.best_rate()


# ---- what it asks of others


def test_hidden_states_are_withheld_while_nobody_drafts_with_them() -> None:
    server = Server([0.6], full=1.0, draft_s={Effort.NONE: 0.0, Effort.CHEAP: 2e-5, Effort.FULL: 2e-3})
    server.run(100)
    awake = []
    for _ in range(200):
        server.step()
        awake.append(server.drafting.hears_states)
    assert 0.05 < np.mean(awake) < 0.5
    for step in np.flatnonzero(np.array(server.efforts[-200:]) == Effort.FULL).tolist():
        assert all(awake[max(0, step - 8) : step + 1]), "a head needs its last tokens"


def test_prompts_beside_trees_are_in_the_price() -> None:
    """A node costs what it adds to a step that is long already; what a second is worth is judged without the prompt."""
    server = Server([0.6], base_s=0.01, slope_s=1e-5)
    server.run(60)
    server.step(chunk=400)
    assert server.verified[-1] > 1
    before = server.speculator.cost.table.copy() if server.speculator.cost else None
    server.step(chunk=400)
    assert server.speculator.cost is not None
    assert (server.speculator.cost.table == before).all(), "steps with prompts say nothing of costs"


def test_before_costs_are_known_rows_share_what_is_drafted() -> None:
    server = Server([0.6] * 4)
    server.speculator.cost = None
    assert server.speculator.choose([0, 1, 2, 3], [64, 64, 5, 64], 4, False) == [12, 12, 5, 12]
    assert server.speculator.choose([1], [64], 1, False) == [64]
    assert server.speculator.effort is Effort.FULL
    assert server.speculator.choose([], [], 0, True) == []
    assert server.speculator.effort is Effort.NONE, "a step of prompts alone drafts nothing and bypasses nobody"
    assert server.speculator.num_bypassed == 0
