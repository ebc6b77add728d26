"""Drafters for tests: views of one tree drafter, with small n-gram caches where a test wants them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np

from drafters import MASKS
from drafters.base import Drafter, Int32, News, RowContext
from drafters.drafter import EXPLORATION, DrafterOptions, TreeDrafter, TreeView
from drafters.head.source import HeadSource
from drafters.ngram import source
from drafters.ngram.source import NgramFiles
from verifier.tree import DraftTrees

Trees = tuple[list[int], list[int], list[float]]


class PlainDecoding(Drafter):
    """Proposes bare roots: the baseline. Owns the last token of each row."""

    max_depth = 0

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def start(self, row: int, context: RowContext) -> None:
        """Remember where the row stands."""
        self._last[row] = context.tokens[-1]

    def update(self, news: News) -> None:
        """Follow the row's last token."""
        for index, row in enumerate(news.rows.tolist()):
            self._last[row] = int(news.tokens[news.starts[index + 1] - 1])

    def propose(self, rows: Int32, max_nodes: Int32, out: DraftTrees) -> None:
        """One bare root per row."""
        for row in rows.tolist():
            out.append_root(self._last[row])


def make_view(
    name: str, vocab_size: int, *, max_rows: int = 4, head: HeadSource | None = None, files: NgramFiles | None = None,
    exploration: tuple[float, float] = EXPLORATION, **constants: Any,
) -> TreeView:  # fmt: skip
    """A fresh drafter under one of its names; `constants` of drafters.ngram.source are set while it is made."""
    options = DrafterOptions(
        vocab_size=vocab_size, max_rows=max_rows, files=files or NgramFiles(), exploration=exploration
    )
    with patch.multiple(source, **constants) if constants else patch.dict({}):
        return TreeView(TreeDrafter(options, head), MASKS[name])


def make_views(vocab_size: int, max_rows: int = 4, head: HeadSource | None = None) -> dict[str, TreeView]:
    """All names of one drafter."""
    return TreeDrafter(DrafterOptions(vocab_size=vocab_size, max_rows=max_rows), head).views()


def read(drafter: Drafter, row: int, tokens: list[int]) -> None:
    """The row won these tokens."""
    drafter.update(News(np.array([row], np.int32), np.array([0, len(tokens)], np.int32), np.array(tokens, np.int64)))


def tree(drafter: Drafter, row: int = 0, max_nodes: int = 16) -> DraftTrees:
    """The checked tree of one row."""
    trees = DraftTrees.allocate(1)
    drafter.propose(np.array([row], np.int32), np.array([max_nodes], np.int32), trees)
    trees.check([max_nodes])
    return trees


def shape(drafter: Drafter, row: int = 0, max_nodes: int = 16) -> Trees:
    """Tokens, parents and scores of the tree of one row."""
    trees = tree(drafter, row, max_nodes)
    span = trees.span(0)
    return trees.tokens[span].tolist(), trees.parents[span].tolist(), trees.scores[span].tolist()
