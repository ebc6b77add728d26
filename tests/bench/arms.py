"""The drafters that the ablations compare, made anew for every cell: nothing learned in one helps another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from drafters import HEAD, MASKS
from drafters.base import Drafter
from drafters.coupling import Coupling
from drafters.drafter import EXPLORATION, DrafterOptions, TreeDrafter, TreeView
from drafters.head.precision import fitting_dtype
from drafters.head.source import HeadSource, TargetEmbeddings
from drafters.head.store import load_head
from drafters.ngram.source import NgramFiles
from tests.drafting import PlainDecoding
from verifier.fingerprint import model_fingerprint

SINGLES = ("trigram", "suffix", "ctc")
"""What hybrid merges."""
ARMS = ("none", *SINGLES, "ctc-uncoupled", "hybrid")
"""ctc-uncoupled: without the target's noise in the ranking at temperature > 0."""
_NO_REACH = 1e-9


@dataclass(frozen=True, slots=True)
class Makers:
    """What the drafters of one target are made from."""

    folder: Path
    """Of the target; heads trained for another one are refused."""
    vocab_size: int
    embeddings: TargetEmbeddings
    table: str = ""
    ctc_head: Path | None = None
    exploration: tuple[float, float] = EXPLORATION

    def make(self, name: str) -> Drafter:
        """A fresh drafter, one of ARMS. Raises: FileError, TableError."""
        if name == "none":
            return PlainDecoding()
        mask = MASKS[name.removesuffix("-uncoupled")]
        files = NgramFiles(table=self.table)
        options = DrafterOptions(vocab_size=self.vocab_size, max_rows=1, files=files, exploration=self.exploration)
        return TreeView(TreeDrafter(options, self._head(name) if mask & HEAD else None), mask)

    def _head(self, name: str) -> HeadSource | None:
        if self.ctc_head is None:
            assert name == "hybrid", f"{name} needs a head"
            return None
        head, info = load_head(self.ctc_head, model_fingerprint(str(self.folder)), str(self.folder))
        coupling = info.coupling
        if name == "ctc-uncoupled":
            coupling = Coupling((1.0,), np.full((1, head.shape.num_slots, 2), (1.0, _NO_REACH)))
        return HeadSource(head, self.embeddings, coupling, max_rows=1, dtype=fitting_dtype("cpu", torch.float32))
