"""Where kernels are tested: compiled where there is a GPU, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else ["cpu"]


def require_kernels(device: str) -> None:
    """Skip a test of kernels that cannot run on `device` in this process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on a CPU with TRITON_INTERPRET=1 only")
