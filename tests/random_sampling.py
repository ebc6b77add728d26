"""Random sampling parameters and logits with ties, infinities and worse; needs no test framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.random_trees import pick
from verifier.plan import SamplingParams


def random_sampling(rng: np.random.Generator, vocab: int) -> SamplingParams:
    def maybe(value: Any, neutral: Any) -> Any:
        return value if rng.random() < 0.5 else neutral

    return SamplingParams(
        max_tokens=50,
        seed=int(rng.integers(-(2**62), 2**62)),
        temperature=pick(rng, 0.0, 0.3, 1.0, 1.7, 1e-5, 50.0),
        top_k=maybe(int(rng.integers(1, vocab + 3)), 0),
        top_p=maybe(float(rng.uniform(0.02, 1.0)), 1.0),
        min_p=maybe(float(rng.uniform(0.0, 0.5)), 0.0),
    )


def random_logits(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    logits = rng.normal(size=shape) * rng.choice([0.0, 0.5, 3, 10])
    if rng.random() < 0.4:
        logits = np.round(logits)  # many ties
    if rng.random() < 0.4:
        logits[rng.random(shape) < 0.3] = -np.inf
    if rng.random() < 0.2:
        logits[0, rng.integers(0, shape[1])] = rng.choice([np.nan, np.inf])
    if rng.random() < 0.1:
        logits[-1] = -np.inf
    return logits
