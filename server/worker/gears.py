"""How the drafters of a step are driven."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gears:
    """The drafters, by name, that do less in a step than they could."""

    light: frozenset[str] = frozenset()
    """They draft the light way: see drafters.base.Drafter.propose_light."""
    asleep: frozenset[str] = frozenset()
    """Nobody drafts with all that they know, nor is soon to: they are told the tokens and no hidden states."""


FULL = Gears()
"""All do what they can."""
