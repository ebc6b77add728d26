"""From logits to tokens on the device, for all places of a step: what verifier.torch.sampling does, by kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.cuda.kernels import OPTIONS
from verifier.cuda.kernels.draw import draw_kernel, finish_kernel
from verifier.cuda.kernels.rank import NUM_DIGITS, count_kernel, rank_kernel
from verifier.cuda.kernels.survey import survey_kernel

_BLOCK = 4096
"""Tokens of one program."""
_ROUNDS = 3
"""Rounds of drawing that are spread over the device; a row that needs more is finished by one program."""
_OPTIONS: dict[str, Any] = {"num_warps": 8, **OPTIONS}


def to_device(array: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """A copy of `array` on the device that nothing waits for; on a CPU the same memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class DrawRecords:
    """How the token at each of S places is chosen, on the device; the flags are the host's."""

    reals: torch.Tensor  # [S, 3] float64: temperature, top_p, min_p
    counts: torch.Tensor  # [S, 3] int64: top_k, seed, position
    has_noise: bool
    has_top_k: bool

    @classmethod
    def make(cls, records: NDArray[Any], positions: NDArray[np.int64], device: torch.device) -> DrawRecords:
        """From ROW_RECORDs [S] (see verifier.rows) and the position to fill at each place [S], in one copy."""
        count = records.shape[0]
        packed = np.empty((2, count + count % 2, 3), np.int64)  # both begin at a multiple of 16 bytes: see InputClass
        write_draws(records, positions, (packed[0, :count].view(np.float64), packed[1, :count]))
        moved = to_device(packed, device)[:, :count]
        return cls(moved[0].view(torch.float64), moved[1], *draw_flags(records))


def write_draws(
    records: NDArray[Any], positions: NDArray[np.int64], out: tuple[NDArray[np.float64], NDArray[np.int64]]
) -> None:
    """Fill the arrays of DrawRecords, `out` [S, 3] each, from ROW_RECORDs and positions [S]."""
    reals, counts = out
    reals[:, 0], reals[:, 1], reals[:, 2] = records["temperature"], records["top_p"], records["min_p"]
    counts[:, 0], counts[:, 1], counts[:, 2] = records["top_k"], records["seed"].view(np.int64), positions


def draw_flags(records: NDArray[Any]) -> tuple[bool, bool]:
    """Whether any of the ROW_RECORDs draws with noise, and of those with top-k."""
    is_noisy = records["temperature"] > 0
    return bool(is_noisy.any()), bool((is_noisy & (records["top_k"] > 0)).any())


def sample(logits: torch.Tensor, records: DrawRecords, block: int = _BLOCK) -> torch.Tensor:
    """The token at each place: temperature, top-k, top-p, min-p, then the argmax with the shared noise.

    Args: logits [S, V], float32 or float64, with penalties and the like already in them.
    Returns: [S] int64; -1 where a row holds NaN or plus infinity, or nothing finite. No host sync.
    """
    num_rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = max(16, min(block, 1 << (vocab - 1).bit_length()))
    num_blocks = -(-vocab // block)
    grid = (num_blocks, num_rows)
    tops = logits.new_empty((num_rows, num_blocks), dtype=torch.float64)
    tokens = logits.new_empty((num_rows, num_blocks), dtype=torch.int32)
    survey_kernel[grid](logits, tops, tokens, logits.stride(0), vocab, num_blocks, block, **_OPTIONS)
    num_rounds = _ROUNDS if records.has_noise else 0  # without top-p the first one settles a row
    thresholds = _thresholds(logits, records, block)
    masses = logits.new_empty((num_rounds, num_rows, 3, num_blocks), dtype=torch.float64)
    winners = logits.new_empty((num_rounds, num_rows, num_blocks), dtype=torch.int32)
    shared = (logits, records.reals, records.counts, tops, tokens, thresholds, masses, winners)
    sizes = (logits.stride(0), vocab, num_rows, num_blocks)
    blocks_pad = 1 << (num_blocks - 1).bit_length()
    for turn in range(num_rounds):
        draw_kernel[grid](*shared, *sizes, turn=turn, block=block, blocks_pad=blocks_pad, **_OPTIONS)
    chosen = logits.new_empty(num_rows, dtype=torch.int64)
    finish_kernel[(num_rows,)](
        *shared, chosen, *sizes, num_rounds=num_rounds, block=block, blocks_pad=blocks_pad, **_OPTIONS
    )
    return chosen


def _thresholds(logits: torch.Tensor, records: DrawRecords, block: int) -> torch.Tensor:
    """The least logit that top-k keeps in each row: [S] float64."""
    num_rows, vocab = logits.shape
    thresholds = logits.new_empty(num_rows, dtype=torch.float64)
    if not records.has_top_k:
        return thresholds.fill_(float("-inf")) if records.has_noise else thresholds  # without noise nobody reads them
    num_passes = logits.element_size()  # eight bits a pass
    counts = torch.zeros((num_passes, num_rows, NUM_DIGITS), dtype=torch.int32, device=logits.device)
    grid = (-(-vocab // block), num_rows)
    for level in range(num_passes):
        count_kernel[grid](logits, records.counts, counts, logits.stride(0), vocab, num_rows, level, block, **_OPTIONS)
    rank_kernel[(num_rows,)](records.counts, counts, thresholds, vocab, num_rows, num_passes, **OPTIONS)
    return thresholds
