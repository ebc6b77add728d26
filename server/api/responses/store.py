"""Responses that are kept for a while, in memory: for those who ask for them again or go on from them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stored:
    """One response, as JSON."""

    response: bytes
    inputs: bytes
    """The items of its own input, an array."""
    history: bytes
    """All items of the conversation up to its end, an array."""

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self.response) + len(self.inputs) + len(self.history)


class ResponseStore:
    """Owns the responses kept, by tenant and id, the one used longest ago first.

    Over a bound such a one goes, of the tenant who keeps most of what is bounded: nobody pushes out what others keep.
    """

    def __init__(self, max_responses: int, max_bytes: int):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._num_bytes = 0

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_responses > 0

    def put(self, tenant: str, id_: str, stored: Stored) -> None:
        """Keep a response. One that alone is over the bound is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        self._kept[tenant, id_] = stored
        self._num_bytes += stored.num_bytes
        while len(self._kept) > self._max_responses or self._num_bytes > self._max_bytes:
            self.delete(*self._to_go((tenant, id_)))

    def _to_go(self, new: tuple[str, str]) -> tuple[str, str]:
        """Which one makes room; not `new`, which somebody was just told of."""
        is_many, parts = len(self._kept) > self._max_responses, Counter[str]()
        for (tenant, _), stored in self._kept.items():
            parts[tenant] += 1 if is_many else stored.num_bytes
        others = [key for key in self._kept if key != new]
        return max(others, key=lambda key: parts[key[0]], default=new)

    def get(self, tenant: str, id_: str) -> Stored | None:
        """A response of this tenant, which counts as used now."""
        stored = self._kept.get((tenant, id_))
        if stored is not None:
            self._kept.move_to_end((tenant, id_))
        return stored

    def delete(self, tenant: str, id_: str) -> bool:
        """Forget a response. Whether there was one."""
        stored = self._kept.pop((tenant, id_), None)
        if stored is not None:
            self._num_bytes -= stored.num_bytes
        return stored is not None
