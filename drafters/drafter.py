"""The drafter: one tree search over n-gram, copy and head, under four names that are masks of these sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drafters import COPY, HEAD, MASKS, NGRAM
from drafters.base import NOBODY, Drafter, Float32, Int32, Int64, News, RowContext
from drafters.calibration import ASKED, first_rates, first_worth
from drafters.candidates import CANDIDATES
from drafters.copy import CopySource
from drafters.head.frames import FRAMES, NO_GUESS, Guess
from drafters.head.source import HeadSource
from drafters.learning import Told, learn
from drafters.ngram.cache import WAYS, make_caches
from drafters.ngram.source import NUM_CANDIDATES, NgramFiles, NgramSource
from drafters.ngram.table import empty_corpus
from drafters.rows import MAX_STOPS, PROMPT_WINDOW, ROW
from drafters.tree_search import MAX_DEPTH, Memory, Packed, best_first
from verifier.tree import DraftTrees

_NO_BIAS: Float32 = np.zeros((1, 0), np.float32)
EXPLORATION = (0.3, 0.0)
"""Weight of the bonus for candidates seen seldom, without a head and with one: measured, docs/decisions.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterOptions:
    """What a TreeDrafter is made from."""

    vocab_size: int
    """Tokens the target can emit; ids beyond it are never proposed."""
    max_rows: int = 64
    files: NgramFiles = field(default_factory=NgramFiles)
    exploration: tuple[float, float] = EXPLORATION


def make_memory(max_rows: int, vocab_size: int) -> Memory:
    """Of a drafter that knows nothing yet."""
    return Memory(
        rows=np.zeros(max_rows, ROW),
        asked=np.zeros(max_rows, ASKED),
        worth=first_worth(),
        rates=first_rates(),
        found=np.zeros(1, CANDIDATES),
        frames=np.zeros(1, FRAMES),
        marks=np.full(vocab_size, -1, np.int64),
    )


class TreeDrafter:
    """Owns the sources, what is known of each row, the calibration, and the search's working memory.

    Row facts, texts and caches belong to rows and tenants. The calibration counts acceptances and holds no text, so
    tenants may share it. One thread may call it. Raises TableError, StateError.
    """

    def __init__(self, options: DrafterOptions, head: HeadSource | None = None) -> None:
        self.options, self.head = options, head
        self.ngram = NgramSource(options.max_rows, options.files)
        self.copy = CopySource(options.max_rows)
        self.memory = make_memory(options.max_rows, options.vocab_size)
        self._ngram, self._memory = tuple(self.ngram.arrays), tuple(self.memory)
        self._bias = (_NO_BIAS, _NO_BIAS) if head is None else head.bias

    def views(self) -> dict[str, TreeView]:
        """A drafter for every name whose sources are there."""
        return {name: TreeView(self, mask) for name, mask in MASKS.items() if mask != HEAD or self.head is not None}

    def start(self, row: int, context: RowContext, mask: int) -> None:
        """A request whose drafts come from the sources `mask` now lives in `row`."""
        mask &= ~(0 if self.head is not None else HEAD)
        self.memory.asked[row] = np.zeros((), ASKED)
        tenant_cache = self.ngram.start(row, context.tenant) if mask & NGRAM else -1
        record = self.memory.rows[row]
        record["length"], record["recent"] = 0, -1  # of a long prompt the first tokens are left out: none of another's
        record["seed"] = context.seed & (2**64 - 1)
        record["temperature"] = context.temperature
        record["mask"], record["tenant_cache"], record["is_trial"] = mask, tenant_cache, context.tenant == NOBODY
        stops = context.stop_ids[:MAX_STOPS]
        record["stops"][: len(stops)], record["num_stops"] = stops, len(stops)
        if mask & COPY:
            self.copy.start(row, context)
        if mask & HEAD and self.head is not None:
            self.head.start(row, self.memory.rows, context.temperature)
        tokens = np.asarray(context.tokens[-PROMPT_WINDOW:], np.int64)
        record["length"] = len(context.tokens) - tokens.size
        self._learn(Told(np.array([row], np.int32), np.array([0, tokens.size], np.int32), tokens, True))

    def update(self, news: News) -> None:
        """Learn what became true: tokens, the target's candidates at all verified nodes, hidden states."""
        if news.rows.size:
            self.copy.make_room(int(np.diff(news.starts).max()))
            trees: tuple[Any, ...] = ()
            if (verified := news.verified) is not None:
                packed = verified.trees.tokens, verified.trees.parents, verified.trees.row_starts
                trees = (verified.first, *packed, verified.candidates, verified.logits)
            self._learn(Told(news.rows, news.starts, news.tokens, False, *trees))
        if self.head is not None and news.hidden is not None:
            self.head.read(news.hidden, self.memory.rows)

    def _learn(self, told: Told) -> None:
        self.ngram.advance()
        learn(tuple(told), self._memory, self._ngram, tuple(self.copy.texts), self.ngram.lesson)

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees, allowed: int) -> None:
        """One tree per row, from those of its sources that are `allowed`. The head is run for rows that may branch."""
        guess, places = NO_GUESS, np.full(rows.size, -1)
        if self.head is not None and allowed & HEAD:
            facts = self.memory.rows
            # A row's last state is missing where a step failed, or ran row by row.
            is_known = self.head.lengths[rows] == facts["length"][rows]
            asked = np.flatnonzero((max_nodes > 1) & (facts["mask"][rows] & HEAD > 0) & is_known)
            if asked.size:
                places[asked] = np.arange(asked.size)
                guess = self.head.guess(rows[asked], facts["temperature"][rows[asked]])
        batch = (rows, max_nodes, out.num_rows, allowed, self.options.exploration)
        best_first(
            batch, self._memory, self._ngram, tuple(self.copy.texts), (*guess, places, *self._bias), packed_of(out)
        )
        out.num_rows += rows.size

    def stop(self, row: int) -> None:
        """Forget the row; its tenant keeps what it was taught."""
        self.memory.rows[row]["mask"] = 0
        self.ngram.stop(row)
        self.copy.stop(row)
        if self.head is not None:
            self.head.stop(row)


class TreeView(Drafter):
    """A TreeDrafter under one name: rows that start here draft from the sources of its mask.

    What one name's rows learn helps the others of the same tenant.
    """

    max_depth = MAX_DEPTH

    def __init__(self, drafter: TreeDrafter, mask: int) -> None:
        self.drafter, self._mask = drafter, mask
        self.num_candidates = NUM_CANDIDATES if mask & NGRAM else 0
        if mask & HEAD and drafter.head is not None:
            self.wants_hidden, self.hidden_window = True, drafter.head.window
            self.has_cheap = mask != HEAD

    def start(self, row: int, context: RowContext) -> None:
        """The row drafts from this view's sources."""
        self.drafter.start(row, context, self._mask)

    def update(self, news: News) -> None:
        """As the drafter."""
        self.drafter.update(news)

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row, from all of its sources."""
        self.drafter.propose(rows, max_nodes, out, self._mask)

    def propose_cheap(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row, without the head."""
        self.drafter.propose(rows, max_nodes, out, self._mask & ~HEAD)

    def stop(self, row: int) -> None:
        """As the drafter."""
        self.drafter.stop(row)

    def sizes(self) -> dict[str, int]:
        """Bytes of its source; a view of several sources leaves them to the views of one."""
        if self._mask == NGRAM:
            return self.drafter.ngram.sizes()
        if self._mask == COPY:
            return {"texts": sum(array.nbytes for array in self.drafter.copy.texts)}
        return self.drafter.head.sizes() if self._mask == HEAD and self.drafter.head is not None else {}

    def save(self) -> None:
        """Write what was learned, once for all views."""
        self.drafter.ngram.save()


def trees_of_frames(lasts: Int64, guess: Guess, bias: tuple[Float32, Float32], max_nodes: int) -> DraftTrees:
    """Trees from a head's frames alone, without noise or calibration: what a head is worth, without a server.

    Args: `lasts` [R], the token that each tree begins with; `guess` of these R places.
    """
    count = lasts.size
    memory = make_memory(count, bias[0].shape[0])
    memory.rows["recent"][:, 0], memory.rows["length"], memory.rows["mask"] = lasts, 1, HEAD
    out, rows = DraftTrees.allocate(count, max_nodes), np.arange(count)
    batch = (rows.astype(np.int32), np.full(count, max_nodes, np.int32), 0, HEAD, EXPLORATION)
    ngram = (*empty_corpus(), make_caches(0, WAYS), make_caches(0, WAYS))
    best_first(batch, tuple(memory), ngram, tuple(CopySource(0).texts), (*guess, rows, *bias), packed_of(out))
    out.num_rows = count
    return out


def packed_of(trees: DraftTrees) -> tuple[Any, ...]:
    """The fields of drafters.tree_search.Packed."""
    return tuple(getattr(trees, name) for name in Packed._fields)
