"""How much the shared noise says of who wins, given a head's estimate: two factors per slot, fitted when it is trained.

The target draws argmax(log p + g). A head knows p only through q, its mean over texts that it cannot know: the further
a slot looks ahead, the flatter q is beside every p that it stands for, and the less the noise decides. So a candidate's
standing is power * log q + reach * g, and its chance the softmax over standings, with the factors that explain held-out
draws best. With both at 1 the coupling of slots behind the first wins nothing at temperature 0.7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafters.base import Float64, Int64
from drafters.compiled import Index, compiled
from verifier.cpu.noise import gumbel

UNFITTED = 0.85
"""Both factors where nothing was fitted."""
LEAST_FACTOR, MOST_FACTOR = 0.05, 3.0
_EULER = 0.5772156649015329


@dataclass(frozen=True, slots=True)
class Coupling:
    """The factors, [H, T, 2] power and reach by temperature and slot. Temperatures rise."""

    temperatures: tuple[float, ...]
    factors: Float64

    @classmethod
    def unfitted(cls, num_slots: int) -> Coupling:
        """Nothing fitted."""
        return cls((1.0,), np.full((1, num_slots, 2), UNFITTED))

    @classmethod
    def from_json(cls, value: Any, num_slots: int) -> Coupling:
        """What `as_json` gave. Raises: ValueError, in words that follow the name of the thing."""
        if not isinstance(value, dict) or set(value) != {"temperatures", "factors"}:
            raise ValueError("must hold temperatures and factors")
        try:
            temperatures = tuple(float(heat) for heat in value["temperatures"])
            factors = np.array(value["factors"], np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError("holds something that is no number") from error
        are_sound = all(0.0 < heat < math.inf for heat in temperatures)
        if not temperatures or not are_sound or temperatures != tuple(sorted(set(temperatures))):
            raise ValueError(f"has temperatures {value['temperatures']!r}, they must be positive and rise")
        if factors.shape != (len(temperatures), num_slots, 2):
            raise ValueError(f"has factors of shape {factors.shape}, not {(len(temperatures), num_slots, 2)}")
        if not ((factors > 0.0) & (factors <= MOST_FACTOR)).all():
            raise ValueError(f"has factors that are not between 0 and {MOST_FACTOR:g}")
        return cls(temperatures, factors)

    def as_json(self) -> dict[str, Any]:
        """Plain lists."""
        return {"temperatures": list(self.temperatures), "factors": self.factors.tolist()}

    def at(self, temperature: float) -> Float64:
        """Factors [T, 2] at a temperature, between the fitted ones by line; below them the noise fades with it."""
        if temperature <= self.temperatures[0]:
            factors: Float64 = self.factors[0].copy()
            factors[:, 1] *= temperature / self.temperatures[0]
            return factors
        place = min(int(np.searchsorted(self.temperatures, temperature)), len(self.temperatures) - 1)
        low, high = self.temperatures[max(0, place - 1)], self.temperatures[place]
        share = 1.0 if high == low else min(1.0, (temperature - low) / (high - low))
        between: Float64 = (1.0 - share) * self.factors[max(0, place - 1)] + share * self.factors[place]
        return between


@compiled
def couple(tokens: Int64, shares: Float64, draw: tuple[Any, Index], reach: Any) -> None:
    """Turn probabilities into the chance that each candidate wins the shared-noise draw, in place.

    A candidate stands at log q + reach * g. The target's own rule has reach 1, and its best standing wins for certain:
    an exact q would deserve infinite factors. The chance is a softmax over standings, against the candidates that are
    not listed, whose best standing is Gumbel around the logarithm of their mass.

    Args: `tokens`, `shares` [candidates]; `draw`, seed and position of the token to be drawn.
    """
    seed, position = draw
    listed = 0.0
    for index in range(tokens.size):
        listed += shares[index]
    # The unlisted mass is taken as 16 equal tokens: few enough for one of them to win now and then.
    rest = max(1.0 - listed, 1e-3)
    rival = math.log(rest / 16.0) + reach * (math.log(16.0) + _EULER)
    highest = rival
    for index in range(tokens.size):
        standing = math.log(max(shares[index], 1e-9)) + reach * gumbel(seed, position, tokens[index])
        shares[index] = standing
        highest = max(highest, standing)
    norm = math.exp(rival - highest)
    for index in range(tokens.size):
        shares[index] = math.exp(shares[index] - highest)
        norm += shares[index]
    for index in range(tokens.size):
        shares[index] /= norm
