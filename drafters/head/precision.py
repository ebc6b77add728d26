"""Which number types are quick where."""

from __future__ import annotations

from pathlib import Path

import torch

from verifier.cpu.products import has_products


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies matrices of bfloat16 itself; where it only pretends to, float32 is faster."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def fitting_dtype(device: str, target: torch.dtype) -> torch.dtype:
    """What a head runs in beside a target of type `target`: a wrong guess costs time only, so the quickest."""
    return torch.bfloat16 if device == "cpu" and (has_bfloat16(device) or has_products()) else target
