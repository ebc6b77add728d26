"""The drafters that the ablations compare, made anew for every cell: nothing learned in one helps another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from drafters.base import Drafter
from drafters.ctc.drafter import CtcDrafter, CtcOptions
from drafters.ctc.precision import fitting_dtype
from drafters.ctc.runner import TargetEmbeddings
from drafters.ctc.store import HeadInfo, load_head
from drafters.hybrid import HybridDrafter, HybridOptions
from drafters.none import NoneDrafter
from drafters.predicted import SuffixDrafter
from drafters.trigram.drafter import TrigramDrafter, TrigramOptions
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
        return load_head(folder, model_fingerprint(str(self.folder)), self.folder.name)[1]

    def head(self, folder: Path, use: HeadUse = AS_TRAINED) -> CtcDrafter:
        """The drafter of the head in `folder`, of the type that it is served in. Raises: HeadError."""
        head, info = load_head(folder, model_fingerprint(str(self.folder)), self.folder.name)
        if not use.has_bias and head.shape.bias_rank:
            with torch.no_grad():
                head.bias_from.zero_()
        is_independent = info.is_independent if use.is_collapsed is None else not use.is_collapsed
        options = CtcOptions(
            is_independent=is_independent,
            max_rows=1,
            dtype=fitting_dtype("cpu", torch.float32),
            is_coupled=use.is_coupled,
        )
        return CtcDrafter(head, self.embeddings, options)
