"""From Settings to a loaded verifier and loaded drafters; the libraries behind them are imported only here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drafters import REGISTRY
from drafters.base import Drafter
from server.config import Settings
from server.errors import StartupError

if TYPE_CHECKING:
    from verifier.runner import Verifier
    from verifier.weights import SharedWeights


def load_verifier(settings: Settings) -> Verifier:
    """Load the target model. Raises: StartupError with one line if it is broken, unsupported or does not fit."""
    from verifier.model import ModelError, OutOfMemory
    from verifier.runner import Verifier, VerifierOptions

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
    )
    try:
        return Verifier(options)
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


def share_weights(verifier: Verifier) -> SharedWeights:
    """The target's own embeddings. Raises: StartupError with one line if it has none to share."""
    from verifier.model import ModelError

    try:
        return verifier.shared_weights
    except ModelError as error:
        raise StartupError(str(error)) from error


def load_drafters(needs: DrafterNeeds) -> dict[str, Drafter]:
    """Every registered drafter by name. Raises: StartupError with one line if one cannot be made."""
    return {name: _MAKERS.get(name, _make_plain)(name, needs) for name in REGISTRY}


def _make_plain(name: str, needs: DrafterNeeds) -> Drafter:
    """A drafter that needs nothing."""
    module, _, class_name = REGISTRY[name].partition(":")
    drafter: Drafter = getattr(importlib.import_module(module), class_name)()
    return drafter


def _make_trigram(name: str, needs: DrafterNeeds) -> Drafter:
    from drafters.trigram.drafter import TrigramDrafter, TrigramOptions
    from drafters.trigram.state import StateError
    from drafters.trigram.table import TableError

    settings = needs.settings
    # The fingerprint guards what was learned under one tokenizer from being read under another.
    is_guarded = bool(settings.trigram_table or settings.trigram_state)
    options = TrigramOptions(
        vocab_size=needs.vocab_size,
        fingerprint=_fingerprint(settings) if is_guarded else "",
        table=settings.trigram_table,
        state=settings.trigram_state,
        search=settings.trigram_search,
        max_rows=settings.max_num_seqs,
    )
    try:
        return TrigramDrafter(options)
    except (TableError, StateError) as error:
        raise StartupError(str(error)) from error


def _fingerprint(settings: Settings) -> str:
    from drafters.trigram.table import tokenizer_fingerprint
    from server.model_files import locate, read
    from server.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(read(locate(settings.model, settings.revision)))
    return tokenizer_fingerprint(tokenizer.get_vocab(with_added_tokens=True))


_MAKERS: dict[str, Callable[[str, DrafterNeeds], Drafter]] = {"trigram": _make_trigram}
