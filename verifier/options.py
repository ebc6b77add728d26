"""What a verifier is asked to load, and what comes of it: device, type, context and pages that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from verifier.memory import CPU_KV_GIB, GIB, PageDemand
from verifier.model import ModelError, OutOfMemory
from verifier.probe import ProbeReport

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GPU_KV_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierOptions:
    """What to load and how much memory to give it; 0 and "auto" choose (see server.config.Settings)."""

    model: str
    revision: str = ""
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    threads: int = 0
    max_model_len: int = 0
    max_rows: int = 64
    max_positions: int = 2048
    page_size: int = 16
    num_pages: int = 0
    kv_cache_gib: float = 0.0
    is_eager: bool = False
    is_compiled: bool = False
    """Quicker code in the place of the network's modules: C++ on a CPU, else compiled layers. Where that fails, it runs
    as without."""
    tensor_parallel_size: int = 1
    """Ranks that split the model: this process and its children. Two or more run the pass as transformers wrote it."""
    rank_timeout_s: float = 60.0
    """How long a rank waits for another one in the middle of a pass."""


@dataclass(frozen=True, slots=True)
class VerifierGeometry:
    """What the scheduler must know of a loaded verifier."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_rows: int
    max_positions: int
    device: str
    dtype: str


def choose_device(device: str) -> str:
    """What "auto" stands for. Raises: ModelError if the device is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch finds no CUDA device")
    return device


def choose_dtype(dtype: str, device: str, report: ProbeReport, is_quick_in_16_bits: bool = False) -> str:
    """What "auto" stands for: a name of DTYPES.

    Args: `is_quick_in_16_bits`, whether a CPU multiplies bfloat16, by code of ours. Weights stored so lose nothing.
    """
    if dtype != "auto":
        return dtype
    if device == "cpu" and is_quick_in_16_bits and report.is_all_linear and report.stored_dtype == "bfloat16":
        return "bfloat16"
    if report.quantization is not None and report.quantization.dtype:
        return report.quantization.dtype  # some formats run in the type they were stored in, and in no other
    return "float32" if device == "cpu" else "bfloat16"


def plan_memory(
    options: VerifierOptions, report: ProbeReport, place: tuple[str, str], agree: Callable[[int], int] = lambda own: own
) -> VerifierGeometry:
    """Context and page counts that fit, or ModelError naming the limit.

    Args: `place` = names of type and device; `agree` gives the least number of pages of all ranks for that of this one.
    """
    dtype, device = place
    max_model_len = options.max_model_len or report.max_model_len
    if max_model_len > report.max_model_len:
        raise ModelError(f"max_model_len {max_model_len} is over the model's limit of {report.max_model_len} tokens")
    page_bytes = report.kv_bytes_per_token(DTYPES[dtype].itemsize) * options.page_size
    demand = PageDemand(max_model_len, options.page_size, options.max_rows)
    num_pages = agree(options.num_pages or demand.fitting(_kv_budget(options, device), page_bytes))
    if num_pages < demand.least:
        # Only a share of the free memory can grow by itself: what was asked for stays too little.
        is_asked_for = bool(options.num_pages or options.kv_cache_gib) or device == "cpu"
        raise (ModelError if is_asked_for else OutOfMemory)(
            f"{num_pages} K/V pages of {options.page_size} tokens cannot hold one request of max_model_len "
            f"{max_model_len} ({demand.pages_per_row} pages and the trash page): lower max_model_len or raise "
            "kv_cache_gib"
        )
    return VerifierGeometry(
        max_model_len=max_model_len,
        vocab_size=report.vocab_size,
        num_pages=num_pages,
        page_size=options.page_size,
        max_rows=options.max_rows,
        max_positions=options.max_positions,
        device=device,
        dtype=dtype,
    )


def _kv_budget(options: VerifierOptions, device: str) -> float:
    """Bytes for K/V pages of one rank."""
    if options.kv_cache_gib:
        return options.kv_cache_gib * GIB / options.tensor_parallel_size
    if device == "cpu":
        return CPU_KV_GIB * GIB / options.tensor_parallel_size
    return _GPU_KV_SHARE * torch.cuda.mem_get_info()[0]
