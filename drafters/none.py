"""The drafter that never guesses: plain decoding, and the baseline of every comparison."""

from __future__ import annotations

from drafters.base import Drafter, Int32, News, RowContext
from verifier.tree import DraftTrees


class NoneDrafter(Drafter):
    """Proposes bare roots. Owns the last token of each row."""

    max_depth = 0

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def start(self, row: int, context: RowContext) -> None:
        """Remember where the row stands."""
        self._last[row] = context.tokens[-1]

    def read(self, news: News) -> None:
        """Follow the row's last token."""
        for index, row in enumerate(news.rows.tolist()):
            self._last[row] = int(news.tokens[news.starts[index + 1] - 1])

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One bare root per row."""
        for row in rows.tolist():
            out.append_root(self._last[row])

    def stop(self, row: int) -> None:
        """Forget the row."""
        self._last.pop(row, None)
