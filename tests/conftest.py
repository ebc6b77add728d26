"""Fixtures that every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.errors import StartupError
from server.tokenizer_reading import Reading, Unreadable

# Triton reads this when it is imported, which transformers does: without a GPU our kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, prompts and texts, which is not part of the project."""
    folder = Path(os.environ.get("FORETOKEN_SHARED") or ROOT.parent / "shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models and texts in {folder}: name the folder in FORETOKEN_SHARED")
    return folder


@pytest.fixture(autouse=True, scope="session")
def tokenizers_read_here() -> Iterator[None]:
    """Tokenizers are read in this process, which has transformers anyway, and not by a child of seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.model_files.read_tokenizer", _read_here)
        yield


def _read_here(folder: Path) -> Reading:
    from server.tokenizer_child import describe

    answer = describe(folder)
    if isinstance(answer, Unreadable):
        raise StartupError(f"the tokenizer of {folder} cannot be read: {answer.reason}")
    return answer
