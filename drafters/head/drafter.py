"""The CTC drafter: trees from the head's frames alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from drafters.base import Drafter, HiddenStates, Int32, News, RowContext
from drafters.coupling import Coupling
from drafters.head.frames import NO_GUESS, Batch, Bias, Guess, Model, Scratch, best_first, make_scratch
from drafters.head.head import Head
from drafters.head.runner import MAX_HEAT, HeadRunner, TargetEmbeddings
from verifier.tree import DraftTrees


@dataclass(frozen=True, slots=True, kw_only=True)
class CtcOptions:
    """How a CtcDrafter turns frames into trees."""

    is_independent: bool = False
    """Whether the head was trained with frame k as a guess of token k (training.train, objective ce)."""
    max_rows: int = 64
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    min_score: float = 0.0
    """Nodes less likely than this to be accepted are not proposed."""
    coupling: Coupling | None = None
    """How much the noise counts beside the head's estimates at temperature > 0; None where it was not fitted."""
    cut: float = 0.4
    """Candidates that would score below cut / max_nodes are not looked for: they would hardly get into the tree."""
    share: float = 2e-4
    """A token is a candidate if some frame gives it more than this part of what it gives to tokens."""
    is_coupled: bool = True
    """Whether the target's noise takes part in the ranking at temperature > 0; off only to measure its worth."""

    def limits(self, head: Head) -> NDArray[np.float64]:
        """The numbers as the compiled search reads them: see the columns there."""
        numbers = [
            head.shape.num_slots,
            self.min_score,
            self.cut,
            self.share,
            MAX_HEAT,
            self.is_independent,
        ]
        return np.array(numbers, np.float64)


class CtcDrafter(Drafter):
    """Proposes what a head's frames spell.

    Owns the head's runner and, of each row, the tokens and how it samples. Where the state of a row's last token never
    came (its step failed, or ran row by row) it proposes a bare root. One thread may call it.
    """

    wants_hidden = True

    def __init__(self, head: Head, embeddings: TargetEmbeddings, options: CtcOptions) -> None:
        shape = head.shape
        self._options = options
        self._runner = HeadRunner(head, embeddings, options.max_rows, options.device, options.dtype)
        coupling = options.coupling or Coupling.plain(shape.num_slots)
        self._rows = CtcRows(options.max_rows, shape.vocab_size, coupling)
        self._model: Model = (bias_of(head), options.limits(head))
        self._scratch = make_scratch(shape.num_slots, shape.vocab_size)
        self.max_depth = shape.num_slots
        self.hidden_window = shape.window

    def start(self, row: int, context: RowContext) -> None:
        """The row begins without states: those of its prompt come with the news."""
        self._rows.start(row, context)
        self._runner.start(row)

    def read(self, news: News) -> None:
        """Follow the rows' tokens, and read the states that predicted them."""
        self._rows.extend(news)
        if news.hidden is not None:
            read_states(self._runner, self._rows, news.hidden)

    def guess(self, rows: Int32) -> tuple[Guess, NDArray[np.bool_]]:
        """Frames behind the last token of each row, and which rows [R] are known: the others' last state never came,
        and their frames mean nothing. Without rows the head is not run."""
        if not rows.size:
            return NO_GUESS, np.zeros(0, np.bool_)
        return self._runner.guess(rows, self._rows.temperatures[rows]), self._is_known(rows)

    def searched(self) -> tuple[Model, Scratch]:
        """What a compiled search reads beside the frames, and its working memory."""
        return self._model, self._scratch

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One tree per row."""
        packed = (out.tokens, out.parents, out.depths, out.ancestors, out.scores, out.sources, out.row_starts)
        limits = np.where(self._is_known(rows), max_nodes, 1).astype(np.int32)
        guess, _ = self.guess(rows[limits > 1])
        batch = self._rows.batch(self._options.is_coupled)
        best_first(rows, limits, out.num_rows, guess, batch, self._model, packed, self._scratch)
        out.num_rows += rows.size

    def _is_known(self, rows: Int32) -> NDArray[np.bool_]:
        lengths = np.array([self._runner.length(row) for row in rows.tolist()], np.int64)
        is_known: NDArray[np.bool_] = lengths == self._rows.lengths[rows]
        return is_known

    def sizes(self) -> dict[str, int]:
        """The head's weights, and its keys, values and features of all rows."""
        return {"head": self._runner.head_bytes, "rows": self._runner.row_bytes}

    def stop(self, row: int) -> None:
        """Forget the row."""
        self._rows.stop(row)
        self._runner.start(row)


class CtcRows:
    """What a head's trees depend on beside its frames. Owns the tokens of each row and how it samples."""

    def __init__(self, max_rows: int, vocab_size: int, coupling: Coupling) -> None:
        self._coupling = coupling
        self._factors = np.zeros((max_rows, *coupling.factors.shape[1:]))
        self._tokens: dict[int, list[int]] = {}
        self.lasts = np.zeros(max_rows, np.int64)
        self.lengths = np.zeros(max_rows, np.int64)
        self.seeds = np.zeros(max_rows, np.uint64)
        self.temperatures = np.zeros(max_rows, np.float64)
        self.stops = np.zeros((max_rows, vocab_size), np.bool_)
        self._no_heat = np.zeros(max_rows, np.float64)

    def start(self, row: int, context: RowContext) -> None:
        """Take what is known of the row."""
        self._tokens[row] = list(context.tokens)
        self.lasts[row], self.lengths[row] = context.tokens[-1], len(context.tokens)
        self.seeds[row] = context.seed & (2**64 - 1)
        self.temperatures[row] = context.temperature
        self._factors[row] = self._coupling.at(context.temperature)
        self.stops[row] = False
        self.stops[row, [token for token in context.stop_ids if 0 <= token < self.stops.shape[1]]] = True

    def extend(self, news: News) -> None:
        """Append the tokens that became true."""
        starts = news.starts.tolist()
        for index, row in enumerate(news.rows.tolist()):
            won = news.tokens[starts[index] : starts[index + 1]].tolist()
            self._tokens[row] += won
            self.lasts[row] = won[-1]
            self.lengths[row] += len(won)

    def following(self, row: int, position: int, count: int) -> list[int]:
        """The tokens behind positions `position`, `position` + 1, ...; fewer than `count` where the text ends."""
        return self._tokens[row][position + 1 : position + 1 + count]

    def stop(self, row: int) -> None:
        """Forget the row."""
        self._tokens.pop(row, None)

    def batch(self, is_coupled: bool = True) -> Batch:
        """The rows as the compiled search reads them."""
        temperatures = self.temperatures if is_coupled else self._no_heat
        return self.lasts, self.lengths, self.seeds, temperatures, self.stops, self._factors


def bias_of(head: Head) -> Bias:
    """The previous-token bias for the compiled search."""
    if not head.shape.bias_rank:
        return np.zeros((head.shape.vocab_size, 0), np.float32), np.zeros((head.shape.vocab_size, 0), np.float32)
    before, after = (table.detach().float().cpu().numpy() for table in (head.bias_from, head.bias_to))
    return np.ascontiguousarray(before), np.ascontiguousarray(after)


def read_states(runner: HeadRunner, rows: CtcRows, hidden: HiddenStates) -> None:
    """Give the runner the states whose next token is known, with those tokens."""
    row_ids: list[int] = []
    positions: list[int] = []
    tokens: list[int] = []
    kept: list[int] = []
    starts = hidden.starts.tolist()
    for index, (row, first) in enumerate(zip(hidden.rows.tolist(), hidden.first.tolist(), strict=True)):
        following = rows.following(row, first, starts[index + 1] - starts[index])
        skipped = max(0, len(following) - runner.window)  # the ring would lose these at once
        tokens += following[skipped:]
        row_ids += [row] * (len(following) - skipped)
        positions += range(first + skipped, first + len(following))
        kept += range(starts[index] + skipped, starts[index] + len(following))
    if not kept:
        return
    states = hidden.states
    if len(kept) < states.shape[0]:
        states = states[torch.tensor(kept, device=states.device)]
    runner.read(np.array(row_ids, np.int32), np.array(positions, np.int64), states, np.array(tokens, np.int64))
