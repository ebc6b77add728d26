"""How many K/V pages a server needs at least, can use at most, and gets: arithmetic only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
CPU_KV_GIB = 4.0
"""K/V memory on a CPU, when nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class PageDemand:
    """What is to be held: up to `max_rows` requests of up to `max_model_len` tokens, and page 0, which is trash."""

    max_model_len: int
    page_size: int
    max_rows: int

    @property
    def pages_per_row(self) -> int:
        """Pages of one request of the longest length."""
        return -(-self.max_model_len // self.page_size)

    @property
    def least(self) -> int:
        """Pages without which not even one request can run."""
        return self.pages_per_row + 1

    @property
    def most(self) -> int:
        """More pages than this would never be used."""
        return self.max_rows * self.pages_per_row + 1

    def fitting(self, budget_bytes: float, page_bytes: int) -> int:
        """As many pages as the budget gives, at most what all rows can fill; may be fewer than `least`."""
        return min(int(budget_bytes // page_bytes), self.most)
