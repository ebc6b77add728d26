"""The adaptive tri-gram drafter: a corpus table plus layers that learn from live traffic.

After ADED (AAAI 2025, arXiv 2407.12021), with per-request and per-tenant layers in place of one table for all, with
decay and bounds, and with the target's candidates at every verified node as learning signal (the idea of Token
Recycling, arXiv 2408.08696).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drafters.base import NOBODY, Drafter, Int32, Int64, News, RowContext
from drafters.ngram.backoff import BlendOptions, Float64, Model, Pool, Scratch, make_scratch
from drafters.ngram.cache import MAX_ORDER, STAMP_LIMIT, Layers
from drafters.ngram.explore import explore
from drafters.ngram.search import Rows, best_first
from drafters.ngram.state import check_place, load_state, save_state, tenant_digest
from drafters.ngram.table import Table
from drafters.ngram.update import Lesson, Trees, commit, learn, make_notes
from verifier.tree import DraftTrees

SEARCHES: dict[str, Any] = {"best-first": best_first, "explore": explore}
"""Draft makers by name; they take the same arguments."""

_PROMPT_WINDOW = 16_384
"""Last tokens of a prompt that are learned: more would not fit the request's layer anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """Size and appetite of one kind of layer. Orders are context lengths in tokens."""

    slots: int
    """Contexts it can hold, a power of two; 0 leaves this kind of layer out."""
    decay: float
    """What is left of a context's old observations after a new one."""
    committed: float
    """Strength of a committed token as an observation."""
    verified: float
    """Strength of the target's candidates at a verified node."""
    committed_orders: tuple[int, ...]
    verified_orders: tuple[int, ...]

    def numbers(self) -> list[float]:
        """One line of the learning numbers: see drafters.ngram.update."""
        bits = [sum(1 << (order - 1) for order in orders) for orders in (self.committed_orders, self.verified_orders)]
        return [self.decay, self.committed, self.verified, float(bits[0]), float(bits[1])]


REQUEST_LAYER = LayerOptions(
    slots=4096, decay=0.95, committed=0.5, verified=1.0, committed_orders=(1, 2, 3, 4), verified_orders=(2, 3)
)
TENANT_LAYER = LayerOptions(
    slots=65536, decay=0.9, committed=0.5, verified=1.0, committed_orders=(2, 3, 4), verified_orders=(1, 2, 3, 4)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploreOptions:
    """Constants of the tree search with an exploration bonus; the defaults are the published ones."""

    c1: float = 32.0
    c2: float = 8.0
    iterations: int = 150
    depth: int = 4
    branch: int = 12
    """Successors of a node that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrigramOptions:
    """What a TrigramDrafter is made from."""

    vocab_size: int
    """Tokens the target can emit; ids beyond it are never proposed."""
    fingerprint: str = ""
    """drafters.ngram.table.tokenizer_fingerprint of the target's tokenizer; empty skips the check."""
    table: str = ""
    """Path of the corpus table; empty means on-line learning only."""
    state: str = ""
    """File that keeps the tenants' layers across restarts; empty keeps nothing."""
    search: str = "best-first"
    max_depth: int = 12
    min_score: float = 0.0
    """Nodes less likely than this to be accepted are not proposed."""
    trust: float = 0.85
    """How firmly the coupled ranking believes its own estimate at temperature > 0."""
    is_sharpened: bool = True
    """Whether estimates are sharpened at temperature 0, where only the target's favourite counts."""
    cut: float = 0.5
    """Candidates that would score below cut / max_nodes are not looked for: they would hardly get into the tree."""
    explore: ExploreOptions = field(default_factory=ExploreOptions)
    num_candidates: int = 6
    candidate_power: float = 1.5
    """The target's probabilities at a verified node are raised to this power before they are learned."""
    max_rows: int = 64
    max_tenants: int = 32
    request: LayerOptions = REQUEST_LAYER
    tenant: LayerOptions = TENANT_LAYER
    blend: BlendOptions = field(default_factory=BlendOptions)


class TrigramDrafter(Drafter):
    """Proposes trees from n-gram statistics.

    Owns the layers of all rows and tenants, and what it knows of each row; one thread may call it. Raises TableError
    from the constructor when the table cannot be used, StateError when the state file cannot.
    """

    def __init__(self, options: TrigramOptions):
        self._options = options
        self.max_depth = options.explore.depth if options.search == "explore" else options.max_depth
        self.num_candidates = options.num_candidates
        self._table = (
            Table.open(options.table, options.fingerprint or None)
            if options.table
            else Table.empty(options.vocab_size, options.fingerprint)
        )
        self._search = SEARCHES[options.search]
        self._request = Layers(options.max_rows, max(4, options.request.slots))
        self._tenant = Layers(options.max_tenants if options.tenant.slots else 1, max(4, options.tenant.slots))
        self._tenants: dict[str, int] = {}  # layer of each tenant's digest, least recently started first
        self._running: dict[int, str] = {}  # tenant of each live row
        self._rows = _make_rows(options.max_rows)
        paper = options.explore
        self._scratch = make_scratch(options.vocab_size, 1 + (paper.iterations + 1) * paper.branch)
        self._notes = make_notes()
        self._blend = options.blend.array()
        self._learning = np.array(
            [[*layer.numbers(), options.candidate_power] for layer in (options.request, options.tenant)]
        )
        self._limits = _limits(options)
        self._stops = np.zeros((options.max_rows, options.vocab_size), np.bool_)
        no_nodes: tuple[Int64, Int32] = np.zeros(0, np.int64), np.zeros(0, np.int32)
        self._no_trees: Trees = (
            *(-1, no_nodes[0], no_nodes[1], no_nodes[1]),
            *(np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)),
        )
        self._tick = 0
        if options.state and options.tenant.slots:
            self._load()

    @property
    def vocab_size(self) -> int:
        """Ids from here on are never proposed."""
        return self._options.vocab_size

    @property
    def _request_pool(self) -> Pool:
        return self._request.words, self._request.floats, self._request.slots, int(self._options.request.slots > 0)

    @property
    def _tenant_pool(self) -> Pool:
        return self._tenant.words, self._tenant.floats, self._tenant.slots, int(self._options.tenant.slots > 0)

    def start(self, row: int, context: RowContext) -> None:
        """Give the row an empty layer of its own and read the prompt into it."""
        if row >= self._request.num_layers:
            self._grow(row)
        self._request.clear(row)
        tails, lengths, seeds, temperatures, tenants = self._rows
        tails[row] = -1
        lengths[row] = 0
        seeds[row] = context.seed & (2**64 - 1)
        temperatures[row] = context.temperature
        self._stops[row] = False
        self._stops[row, [token for token in context.stop_ids if 0 <= token < self._stops.shape[1]]] = True
        digest = tenant_digest(context.tenant)
        self._running[row] = digest
        is_kept = self._options.tenant.slots and context.tenant != NOBODY
        tenants[row] = self._tenant_layer(digest) if is_kept else -1
        tokens = np.asarray(context.tokens[-_PROMPT_WINDOW:], np.int64)
        self._advance()
        commit(row, tokens, self._rows, self._lesson(), self._notes, False)
        lengths[row] = len(context.tokens)

    def read(self, news: News) -> None:
        """Learn committed tokens and, where trees were verified, the target's candidates at all their nodes."""
        self._advance()
        verified, trees = news.verified, self._no_trees
        if verified is not None:
            packed = verified.trees
            trees = (
                *(verified.first, packed.tokens, packed.parents, packed.row_starts),
                *(verified.candidates, verified.logits),
            )
        memory = self._scratch, self._notes
        learn(news.rows, news.starts, news.tokens, self._rows, self._lesson(), trees, memory)

    def _advance(self) -> None:
        """The next time stamp."""
        self._tick += 1
        while self._tick >= STAMP_LIMIT:
            self._request.halve_stamps()
            self._tenant.halve_stamps()
            self._tick //= 2

    def _lesson(self) -> Lesson:
        return self._learning, self._request_pool, self._tenant_pool, self._tick

    def searched(self) -> tuple[Rows, Model, Scratch]:
        """What a compiled search reads, and its working memory; valid until the next `start`."""
        model = (self._table.corpus, self._request_pool, self._tenant_pool, self._blend, self._limits, self._stops)
        return self._rows, model, self._scratch

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row, by the chosen search."""
        packed = (out.tokens, out.parents, out.depths, out.ancestors, out.scores, out.sources, out.row_starts)
        table, model, scratch = self.searched()
        self._search(
            rows, max_nodes, out.num_rows, table, model, packed, scratch,
        )  # fmt: skip
        out.num_rows += rows.size

    def stop(self, row: int) -> None:
        """Forget the row and its layer; its tenant keeps what it was taught."""
        self._running.pop(row, None)
        self._request.clear(row)
        self._rows[4][row] = -1

    def sizes(self) -> dict[str, int]:
        """The corpus table, and the layers that are taken: one of each live row, one of each tenant."""
        return {
            "table": sum(array.nbytes for array in self._table.corpus),
            "request_layers": len(self._running) * self._request.layer_bytes,
            "tenant_layers": len(self._tenants) * self._tenant.layer_bytes,
        }

    def save(self) -> None:
        """Write the tenants' layers to the state file, if there is one. Raises: StateError."""
        if self._options.state and self._options.tenant.slots:
            save_state(Path(self._options.state), self._tenant, self._tenants, self._options.fingerprint)

    def _load(self) -> None:
        path = Path(self._options.state)
        check_place(path)
        if not path.exists():
            return
        self._tenants, self._tick = load_state(path, self._tenant, self._options.fingerprint)

    def _tenant_layer(self, digest: str) -> int:
        """The tenant's layer; when all are taken, the one unused for longest and with no live row is emptied."""
        layer = self._tenants.pop(digest, None)
        if layer is None and len(self._tenants) < self._tenant.num_layers:
            layer = len(self._tenants)
        if layer is None:
            live = set(self._running.values())
            idle = next((name for name in self._tenants if name not in live), None)
            if idle is None:
                return -1
            layer = self._tenants.pop(idle)
            self._tenant.clear(layer)
        self._tenants[digest] = layer
        return layer

    def _grow(self, row: int) -> None:
        count = max(row + 1, 2 * self._request.num_layers)
        self._request.grow(count)
        grown = _make_rows(count)
        for new, old in zip(grown, self._rows, strict=True):
            new[: old.shape[0]] = old
        self._rows = grown
        stops = np.zeros((count, self._stops.shape[1]), np.bool_)
        stops[: self._stops.shape[0]] = self._stops
        self._stops = stops


def _make_rows(count: int) -> Rows:
    tenants: Int64 = np.full(count, -1, np.int64)
    return (
        np.full((count, MAX_ORDER), -1, np.int64),
        np.zeros(count, np.int64),
        np.zeros(count, np.uint64),
        np.zeros(count, np.float64),
        tenants,
    )


def _limits(options: TrigramOptions) -> Float64:
    paper = options.explore
    return np.array(
        [
            *(options.max_depth, options.min_score, options.trust, options.is_sharpened, options.cut),
            *(paper.c1, paper.c2, paper.iterations, paper.depth, paper.branch),
        ],
        np.float64,
    )
