"""The ways to draft: a drafter with all it knows, or its light way, which one it goes, and what asking it costs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from drafters.base import Int64
from server.worker.admission import Drafters, Float64
from server.worker.cost import CostCurve

_DRAFTED = 1024


class Ways:
    """Ways are numbered: first all drafters with all they know, in their order, then the light ways.

    Owns what drafting costs on each way, and which one each drafter goes.
    """

    def __init__(self, drafters: Sequence[str], with_light: Collection[str]) -> None:
        lights = [name for name in drafters if name in with_light]
        self.names = (*drafters, *lights)
        """The drafter of each way."""
        self.full = {name: way for way, name in enumerate(drafters)}
        """The way of each drafter with all it knows."""
        self.light = {name: len(drafters) + place for place, name in enumerate(lights)}
        """The light way of those that have one."""
        self.is_fixed = False
        """Whether this is a trial: every row drafts, on the ways that were insisted on."""
        self._going: Int64 = np.arange(len(drafters))
        self._costs = [CostCurve.unknown(_DRAFTED) for _ in self.names]  # seconds by drafted nodes of a step

    def __len__(self) -> int:
        return len(self.names)

    def going(self, full: Int64) -> Int64:
        """The ways that drafters, named by their `full` ways [R], go now."""
        return self._going[full]

    def is_light(self, name: str) -> bool:
        """Whether a drafter goes its light way now."""
        return name in self.light and self._going[self.full[name]] == self.light[name]

    def others(self, full: Int64) -> Iterator[tuple[int, int]]:
        """Of each of these drafters with two ways: its full way, and the one that it does not go."""
        for name, light in self.light.items():
            way = self.full[name]
            if (full == way).any():
                yield way, light if self._going[way] == way else way

    def turn(self, full: int, way: int) -> None:
        """A drafter goes another way from now on."""
        self._going[full] = way

    def insist(self, is_light: bool | None) -> None:
        """Drafters with two ways go the light one, or the full one, whatever it costs; None ends the trial."""
        self.is_fixed = is_light is not None
        for name, light in self.light.items():
            self.turn(self.full[name], light if is_light else self.full[name])

    def cost_s(self, way: int, num_nodes: float) -> float:
        """Seconds of drafting so many nodes on a way."""
        return self._costs[way].at(num_nodes)

    def asking(self, ways: Int64, nodes: Float64) -> Drafters:
        """What it costs to ask for trees of so many `nodes` [R] on these ways [R], as `choose_rows` reads it."""
        fixed_s, node_s = np.zeros(len(self)), np.zeros(len(self))
        for way, total in enumerate(np.bincount(ways, nodes, len(self)).tolist()):
            if total:
                whole, half = self.cost_s(way, total), self.cost_s(way, 0.5 * total)
                node_s[way] = 2.0 * (whole - half) / total
                fixed_s[way] = max(0.0, 2.0 * half - whole)
        return ways, fixed_s, node_s[ways] * nodes

    def observe(self, num_nodes: Sequence[int], drafters_s: Mapping[str, float]) -> None:
        """So many nodes were drafted on each way, in so many seconds by drafter: one goes one way in a step."""
        for way, num_drafted in enumerate(num_nodes):
            seconds = drafters_s.get(self.names[way], 0.0)
            if num_drafted and seconds > 0.0:
                self._costs[way].observe(num_drafted, seconds)
