"""The drafters that the ablations compare, made anew for every cell: nothing learned in one helps another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from drafters.base import Drafter, Int32
from drafters.drafter import HybridDrafter, HybridOptions
from drafters.head.drafter import CtcDrafter, CtcOptions
from drafters.head.frames import Guess
from drafters.head.head import Head
from drafters.head.precision import fitting_dtype
from drafters.head.runner import TargetEmbeddings
from drafters.head.store import HeadInfo, load_head
from drafters.ngram.drafter import TrigramDrafter, TrigramOptions
from drafters.none import NoneDrafter
from drafters.predicted import SuffixDrafter
from verifier.fingerprint import model_fingerprint

SINGLES = ("trigram", "suffix", "ctc")
"""What hybrid merges."""
ARMS = ("none", *SINGLES, "ctc-uncoupled", "ce", "hybrid")
"""ce: the tree of a head trained with --objective ce."""


@dataclass(frozen=True, slots=True)
class HeadUse:
    """How a head is asked for trees."""

    is_collapsed: bool | None = None
    """Whether frames are collapsed, None as the head was trained; without it blanks are simply left out, and frame k
    guesses token k."""
    has_bias: bool = True
    """Whether the previous-token bias takes part."""
    is_coupled: bool = True


AS_TRAINED = HeadUse()


class WatchedHead(CtcDrafter):
    """Also sums what its frames give to the blank. Owns the sums."""

    def __init__(self, head: Head, embeddings: TargetEmbeddings, options: CtcOptions) -> None:
        super().__init__(head, embeddings, options)
        self._blanks = np.zeros(head.shape.num_slots)
        self._num_guesses = 0

    def guess(self, rows: Int32) -> tuple[Guess, NDArray[np.bool_]]:
        """As a CtcDrafter; a row without frames counts for nothing."""
        guess, is_known = super().guess(rows)
        self._blanks += guess[1][is_known, :, -1].sum(axis=0, dtype=np.float64)
        self._num_guesses += int(is_known.sum())
        return guess, is_known

    @property
    def blank_by_slot(self) -> list[float]:
        """Mean probability of the blank in each frame: where it is next to nothing, there is nothing to collapse."""
        return [round(float(total), 4) for total in self._blanks / max(1, self._num_guesses)]


@dataclass(frozen=True, slots=True)
class Makers:
    """What the drafters of one target are made from."""

    folder: Path
    """Of the target; heads trained for another one are refused."""
    vocab_size: int
    embeddings: TargetEmbeddings
    table: str = ""
    ctc_head: Path | None = None
    ce_head: Path | None = None

    def make(self, name: str) -> Drafter:
        """A fresh drafter, one of ARMS. Raises: HeadError, TableError."""
        if name == "none":
            return NoneDrafter()
        if name == "trigram":
            return self._trigram()
        if name == "suffix":
            return SuffixDrafter()
        if name == "hybrid":
            ctc = None if self.ctc_head is None else self.head(self.ctc_head)
            return HybridDrafter(self._trigram(), ctc, HybridOptions(max_rows=1))
        folder = self.ce_head if name == "ce" else self.ctc_head
        assert folder is not None, f"{name} needs a head"
        return self.head(folder, replace(AS_TRAINED, is_coupled=name != "ctc-uncoupled"))

    def _trigram(self) -> TrigramDrafter:
        return TrigramDrafter(TrigramOptions(vocab_size=self.vocab_size, table=self.table, max_rows=1))

    def info(self, folder: Path) -> HeadInfo:
        """What is known of the head in `folder`. Raises: HeadError also if it is another target's."""
        return load_head(folder, model_fingerprint(str(self.folder)), str(self.folder))[1]

    def head(self, folder: Path, use: HeadUse = AS_TRAINED) -> WatchedHead:
        """The drafter of the head in `folder`, of the type that it is served in. Raises: HeadError."""
        head, info = load_head(folder, model_fingerprint(str(self.folder)), str(self.folder))
        if not use.has_bias and head.shape.bias_rank:
            with torch.no_grad():
                head.bias_from.zero_()
        is_independent = info.is_independent if use.is_collapsed is None else not use.is_collapsed
        options = CtcOptions(
            is_independent=is_independent,
            coupling=info.coupling,
            max_rows=1,
            dtype=fitting_dtype("cpu", torch.float32),
            is_coupled=use.is_coupled,
        )
        return WatchedHead(head, self.embeddings, options)
