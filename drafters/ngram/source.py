"""The n-gram source: a corpus table plus caches that learn from live traffic.

After ADED (AAAI 2025, arXiv 2407.12021), with caches per request and per tenant in place of one table for all, with
decay and bounds, and with the target's candidates at every verified node as learning signal (the idea of Token
Recycling, arXiv 2408.08696).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drafters.base import NOBODY
from drafters.ngram.backoff import Ngram
from drafters.ngram.cache import STAMP_LIMIT, clear, halve_stamps, make_caches
from drafters.ngram.state import check_place, load_state, save_state, tenant_digest
from drafters.ngram.table import Table, empty_corpus
from drafters.ngram.update import LESSON

NUM_CANDIDATES = 6
"""How many of the target's tokens are learned at a verified node: as many as a slot holds."""
REQUEST_SLOTS = 4096
"""Contexts of one request: 256 KiB, some 1,000 tokens at four contexts each. A power of two."""
TENANT_SLOTS = 65536
"""Contexts of one tenant: 4 MiB, written as they are needed."""
MAX_TENANTS = 32
"""Tenants that are remembered; the one idle longest makes room."""


@dataclass(frozen=True, slots=True)
class Appetite:
    """How one kind of cache learns: see drafters.ngram.update.APPETITE. Orders are context lengths in tokens."""

    decay: float
    committed_orders: tuple[int, ...]
    verified_orders: tuple[int, ...]

    def records(self) -> list[tuple[float, int]]:
        """The compiled records, by event."""
        events = self.committed_orders, self.verified_orders
        return [(self.decay, sum(1 << (k - 1) for k in orders)) for orders in events]


# Measured with tests/bench/trigram_ablation.py. A request forgets more slowly than a tenant: its text is of one kind.
REQUEST = Appetite(0.95, committed_orders=(1, 2, 3, 4), verified_orders=(2, 3))
TENANT = Appetite(0.9, committed_orders=(2, 3, 4), verified_orders=(1, 2, 3, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramFiles:
    """Where an n-gram source reads and keeps what it knows."""

    table: str = ""
    """Path of the corpus table; empty means on-line learning only."""
    state: str = ""
    """File that keeps the tenants' caches across restarts; empty keeps nothing."""
    fingerprint: str = ""
    """drafters.ngram.table.tokenizer_fingerprint of the target's tokenizer; empty skips the check."""


class NgramSource:
    """Owns the table, the caches of all rows and tenants, and the time. One thread may call it.

    Raises TableError from the constructor when the table cannot be used, StateError when the state file cannot.
    """

    def __init__(self, max_rows: int, files: NgramFiles) -> None:
        self._files = files
        self.corpus = Table.open(files.table, files.fingerprint or None).corpus if files.table else empty_corpus()
        self.request = make_caches(max_rows, REQUEST_SLOTS)
        self.tenant = make_caches(MAX_TENANTS, TENANT_SLOTS)
        self.arrays = Ngram(*self.corpus, self.request, self.tenant)
        self.tenants: dict[str, int] = {}  # cache of each tenant's digest, least recently started first
        self._running: dict[int, str] = {}  # tenant of each live row
        self._tick, self._saved_tick = 0, -1
        self.lesson = np.zeros(1, LESSON)
        self.lesson["appetites"][0] = [REQUEST.records(), TENANT.records()]
        if files.state:
            check_place(Path(files.state))
            if Path(files.state).exists():
                self.tenants, self._tick = load_state(Path(files.state), self.tenant, files.fingerprint)

    def start(self, row: int, tenant: str) -> int:
        """Give the row an empty cache of its own. Returns: its tenant's cache, -1 for none."""
        clear(self.request[row])
        digest = tenant_digest(tenant)
        self._running[row] = digest
        return self._tenant_cache(digest) if tenant != NOBODY else -1

    def advance(self) -> None:
        """The next time stamp."""
        self._tick += 1
        while self._tick >= STAMP_LIMIT:
            halve_stamps(self.request)
            halve_stamps(self.tenant)
            self._tick //= 2
        self.lesson["stamp"] = self._tick

    def stop(self, row: int) -> None:
        """Forget the row and its cache; its tenant keeps what it was taught."""
        if self._running.pop(row, None) is not None:
            clear(self.request[row])

    def sizes(self) -> dict[str, int]:
        """Bytes of the corpus table, and of the caches that are taken: one of each live row, one of each tenant."""
        return {
            "table": sum(array.nbytes for array in self.corpus),
            "request_layers": len(self._running) * self.request[0].nbytes,
            "tenant_layers": len(self.tenants) * self.tenant[0].nbytes,
        }

    def save(self) -> None:
        """Write the tenants' caches to the state file, if there is one and they have changed. Raises: StateError."""
        if self._files.state and self._tick != self._saved_tick:
            save_state(Path(self._files.state), self.tenant, self.tenants, self._files.fingerprint)
            self._saved_tick = self._tick

    def _tenant_cache(self, digest: str) -> int:
        """The tenant's cache; when all are taken, the one unused for longest and with no live row is emptied."""
        cache = self.tenants.pop(digest, None)
        if cache is None and len(self.tenants) < self.tenant.shape[0]:
            cache = len(self.tenants)
        if cache is None:
            live = set(self._running.values())
            idle = next((name for name in self.tenants if name not in live), None)
            if idle is None:
                return -1
            cache = self.tenants.pop(idle)
            clear(self.tenant[cache])
        self.tenants[digest] = cache
        return cache
