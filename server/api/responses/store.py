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

    Over a bound such a one goes, of the tenant whose responses take most: who keeps many does not push out others'.
    """

    def __init__(self, max_responses: int, max_bytes: int):
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._bytes_of: Counter[str] = Counter()
        """By tenant; all that have a response."""

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_responses > 0

    def put(self, tenant: str, id_: str, stored: Stored) -> None:
        """Keep a response. One that alone is over the bound is not kept."""
        if stored.num_bytes > self._max_bytes:
            return
        self._kept[tenant, id_] = stored
        self._bytes_of[tenant] += stored.num_bytes
        while len(self._kept) > self._max_responses or self._bytes_of.total() > self._max_bytes:
            [(most, _)] = self._bytes_of.most_common(1)
            self.delete(*next(key for key in self._kept if key[0] == most))

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
            self._bytes_of[tenant] -= stored.num_bytes
            if not self._bytes_of[tenant]:
                del self._bytes_of[tenant]
        return stored is not None
