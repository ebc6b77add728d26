"""The speculator over a simulated server: what it chooses, what it learns, and that nothing keeps it from coming back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from drafters.base import RowContext
from server.worker.drafting import Drafting, Effort
from server.worker.speculator import Speculator
from server.worker.step_cost import DraftSample, Profile, StepCost, StepSample
from verifier.plan import NOTHING, Chunk, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SLOW_S = 0.002
Noise = Callable[[int], float]
"""Factor on the seconds of a step, by its positions."""


def quiet(size: int) -> float:
    return 1.0


class Guesses(Drafting):
    """Guesses chains whose nodes come true with a chance of their own; what they say of it may be wrong."""

    def __init__(self, server: Server) -> None:
        super().__init__({}, max_rows=server.num_rows, vocab_size=100)
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
            said = self.server.said(slot.row, effort)
            size = min(slot.max_nodes, self.server.num_nodes)
            is_asked |= slot.max_nodes > 1
            scores = [said**node for node in range(size)]
            self.trees.append(list(range(size)), list(range(-1, size - 1)), scores, [0] + [4] * (size - 1))
        if is_asked:
            self.spent_s["d"] = self.spent_s.get("d", 0.0) + self.server.draft_s[effort] * self.server.noise(1)

    def wanted(self, plan: StepPlan) -> Wanted:
        return NOTHING

    def read(self, plan: StepPlan, verdict: Verdict, kept: Sequence[int]) -> None:
        pass


@dataclass
class Server:
    """Rows that never end. Owns a clock that only costs move."""

    cheap: list[float]
    """By row, the chance that a node of a cheap draft comes true if its parent did."""
    full: float | None = None
    """With full effort it is so much higher."""
    optimism: float = 1.0
    """What drafts say of their chances, as a factor."""
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
        self.rng = random.Random(self.seed)
        self.num_rows = len(self.cheap)
        self.drafting = Guesses(self)
        self.speculator = Speculator(self.drafting, self.num_rows)
        steps = tuple(StepSample(size, 1, self.quiet_s(size) * self.start_noise(size)) for size in SIZES)
        drafts = tuple(
            DraftSample(effort, rows, self.draft_s[effort] * self.start_noise(1))
            for effort in (Effort.CHEAP, Effort.FULL)
            for rows in (1, 8)
        )
        self.speculator.begin(StepCost(Profile(steps, drafts), SIZES[-1]))
        for row in range(self.num_rows):
            self.speculator.start(row, "d", RowContext("", (), 0, 0, 0.0))
        self.clock, self.num_won = 0.0, 0
        self.expected, self.expected_s = 0.0, 0.0
        self.verified: list[int] = []
        self.efforts: list[Effort] = []

    def quiet_s(self, size: int) -> float:
        return self.base_s + self.slope_s * size

    def chance(self, row: int, effort: Effort) -> float:
        return min(0.98, self.cheap[row] * (self.full if effort is Effort.FULL and self.full else 1.0))

    def said(self, row: int, effort: Effort) -> float:
        return min(1.0, self.optimism * self.chance(row, effort))

    def step(self, chunk: int = 0) -> None:
        rows = list(range(self.num_rows))
        limits = self.speculator.choose(rows, [64] * self.num_rows)
        chunks = (Chunk(self.num_rows, 0, (1,) * chunk, False),) if chunk else ()
        plan = StepPlan(trees=tuple(TreeSlot(row, 10, limits[row]) for row in rows), chunks=chunks)
        trees = self.speculator.draft(plan, [0] * self.num_rows)
        trees.check()
        sizes = np.diff(trees.row_starts[: trees.num_rows + 1]).tolist()
        effort = self.speculator.effort
        tokens = np.full((self.num_rows, max(sizes) + 1), 99, np.int64)
        kept = []
        for row in rows:
            won = 0
            while won < sizes[row] - 1 and self.rng.random() < self.chance(row, effort):
                tokens[row, won] = won + 1
                won += 1
            # What the model says of its own may be what the next node, cut away, had guessed.
            if self.rng.random() < self.chance(row, effort) and won == sizes[row] - 1:
                tokens[row, won] = won + 1
            kept.append(won + 1)
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
        return won / (self.quiet_s(self.num_rows * size) + spent_s)

    def best_rate(self) -> float:
        efforts = [Effort.CHEAP] if self.full is None else [Effort.CHEAP, Effort.FULL]
        return max(self.rate_of(size, effort) for size in range(1, 24) for effort in efforts)


@pytest.mark.parametrize("num_rows", [1, 4, 32])
@pytest.mark.parametrize("chance", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("slope_s", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("optimism", [0.7, 1.0, 1.5])
def test_it_is_about_as_fast_as_the_best_fixed_size(
    num_rows: int, chance: float, slope_s: float, optimism: float
) -> None:
    server = Server([chance] * num_rows, slope_s=slope_s, optimism=optimism)
    server.run(60)
    assert server.run(400) >= 0.93 * server.best_rate()


if __name__ == "__main__":
    for num_rows in (1, 4, 32):
        for chance in (0.02, 0.3, 0.6, 0.9):
            for slope in (1e-6, 1e-4, 1e-3):
                for optimism in (0.7, 1.0, 1.5):
                    server = Server([chance] * num_rows, slope_s=slope, optimism=optimism)
                    server.run(60)
                    print(num_rows, chance, slope, optimism, round(server.run(400) / server.best_rate(), 3),
                          np.mean(server.verified[-100:]))
