"""From Settings to a loaded verifier and loaded drafters; the libraries behind them are imported only here."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drafters import OTHERS
from drafters.base import Drafter
from server import default_model
from server.config import Settings
from server.errors import StartupError

if TYPE_CHECKING:
    from drafters.drafter import TreeDrafter
    from drafters.head.source import HeadSource
    from verifier.backend import Backend
    from verifier.weights import SharedWeights

logger = logging.getLogger(__name__)


def load_verifier(settings: Settings) -> Backend:
    """Load the target model. Raises: StartupError with one line if it is broken, unsupported or does not fit."""
    from verifier.load import load_backend
    from verifier.model import ModelError, OutOfMemory
    from verifier.options import VerifierOptions

    options = VerifierOptions(
        model=settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        attention=settings.attention,
        threads=settings.threads,
        max_model_len=settings.max_model_len,
        max_rows=settings.max_num_seqs,
        max_positions=settings.max_num_batched_tokens,
        page_size=settings.page_size,
        num_pages=settings.num_pages,
        kv_cache_gib=settings.kv_cache_gib,
        is_eager=settings.eager,
        is_compiled=settings.compile,
        tensor_parallel_size=settings.tensor_parallel_size,
    )
    try:
        return load_backend(options)
    except ModelError as error:
        raise StartupError(str(error), is_final=not isinstance(error, OutOfMemory)) from error


def _no_target() -> SharedWeights:
    raise StartupError("a drafter that shares the target's weights needs a loaded target")


@dataclass(frozen=True, slots=True)
class DrafterNeeds:
    """What making a drafter may take."""

    settings: Settings
    vocab_size: int
    device: str = "cpu"
    """Where the target runs, and so whatever reads its hidden states."""
    dtype: str = "float32"
    """The type of its weights and states, as torch calls it."""
    shared_weights: Callable[[], SharedWeights] = _no_target
    """The target's own embeddings; raises StartupError with one line if they cannot be shared."""


def share_weights(verifier: Backend) -> SharedWeights:
    """The target's own embeddings. Raises: StartupError with one line if it has none to share."""
    from verifier.model import ModelError

    try:
        return verifier.shared_weights
    except ModelError as error:
        raise StartupError(str(error)) from error


def load_drafters(needs: DrafterNeeds) -> dict[str, Drafter]:
    """Every registered drafter by name, `ctc` only if there is a head. Raises: StartupError with one line."""
    return {**_make_tree_drafter(needs).views(), **{name: _make_other(place) for name, place in OTHERS.items()}}


def _make_other(place: str) -> Drafter:
    """A drafter that needs nothing, from "module:Class"."""
    module, _, class_name = place.partition(":")
    drafter: Drafter = getattr(importlib.import_module(module), class_name)()
    return drafter


def _make_tree_drafter(needs: DrafterNeeds) -> TreeDrafter:
    from drafters.drafter import DrafterOptions, TreeDrafter
    from drafters.ngram.source import NgramFiles
    from drafters.ngram.state import StateError
    from drafters.ngram.table import TableError

    settings = needs.settings
    # The fingerprint guards what was learned under one tokenizer from being read under another.
    is_guarded = bool(settings.trigram_table or settings.trigram_state)
    files = NgramFiles(
        table=settings.trigram_table,
        state=settings.trigram_state,
        fingerprint=_fingerprint(settings) if is_guarded else "",
    )
    options = DrafterOptions(vocab_size=needs.vocab_size, max_rows=settings.max_num_seqs, files=files)
    try:
        return TreeDrafter(options, _make_head(needs) if settings.ctc_head else None)
    except (TableError, StateError) as error:
        raise StartupError(str(error)) from error


def _make_head(needs: DrafterNeeds) -> HeadSource | None:
    import torch

    from drafters.head.files import FileError
    from drafters.head.precision import fitting_dtype
    from drafters.head.source import HeadSource
    from drafters.head.store import load_head
    from verifier.fingerprint import model_fingerprint
    from verifier.model import ModelError

    settings, shared = needs.settings, needs.shared_weights()
    try:
        fingerprint = model_fingerprint(settings.model, settings.revision)
        head, info = load_head(Path(settings.ctc_head), fingerprint, settings.model)
    except (FileError, ModelError) as error:
        if not default_model.is_own_head(settings):
            raise StartupError(str(error)) from error
        logger.warning("%s; serving without it", error)  # nobody asked for this head
        return None
    dtype = fitting_dtype(needs.device, getattr(torch, needs.dtype))
    return HeadSource(head, shared, info.coupling, max_rows=settings.max_num_seqs, device=needs.device, dtype=dtype)


def _fingerprint(settings: Settings) -> str:
    from drafters.ngram.table import tokenizer_fingerprint
    from server.model_files import locate, read
    from server.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(read(locate(settings.model, settings.revision)))
    return tokenizer_fingerprint(tokenizer.get_vocab(with_added_tokens=True))
