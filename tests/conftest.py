"""Fixtures that every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
