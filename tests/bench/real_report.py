"""What measurements on real models come to: looping answers, ratios with their ranges, tables. No model, no clock."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_GRAM = 8
_MOST_REPEATED = 0.3
"""An answer that repeats more of its 8-grams loops: copying looks too good on it."""
_NUM_RESAMPLES = 2000


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether more than 30 % of the answer's 8-grams have come before in it."""
    num_grams = len(tokens) - _GRAM + 1
    if num_grams < 1:
        return False
    different = {tuple(tokens[start : start + _GRAM]) for start in range(num_grams)}
    return (num_grams - len(different)) / num_grams > _MOST_REPEATED


@dataclass(frozen=True, slots=True)
class Ratio:
    """One arm over another: the median over paired rounds, the least and the most of them."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Of speeds by round. Both arms ran in every round."""
    pairs = [mine / theirs for mine, theirs in zip(over, under, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


@dataclass(frozen=True, slots=True)
class Comparison:
    """An arm beside the best of the others."""

    best: str
    ratio: Ratio
    """Its range is the 95 % interval."""


def against_best(speeds: Mapping[str, Sequence[float]], name: str, seed: int = 0) -> Comparison:
    """The arm `name` over the one of the others whose median speed is highest; speeds by arm and round.

    The interval is a bootstrap over rounds, in which the best is chosen anew each time: which of several alike arms was
    luckiest is a part of the noise.
    """
    num_rounds = len(speeds[name])
    best, median = _median_over_best(speeds, name, range(num_rounds))
    draw = random.Random(seed)
    resampled = sorted(
        _median_over_best(speeds, name, draw.choices(range(num_rounds), k=num_rounds))[1] for _ in range(_NUM_RESAMPLES)
    )
    edge = round(0.025 * (_NUM_RESAMPLES - 1))
    return Comparison(best, Ratio(median, resampled[edge], resampled[-1 - edge]))


def _median_over_best(speeds: Mapping[str, Sequence[float]], name: str, rounds: Sequence[int]) -> tuple[str, float]:
    others = [other for other in speeds if other != name]
    best = max(others, key=lambda other: statistics.median(speeds[other][index] for index in rounds))
    return best, statistics.median(speeds[name][index] / speeds[best][index] for index in rounds)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, columns aligned: it is read in a terminal and copied into documents."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in text)
