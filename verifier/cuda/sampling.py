"""The device's sampler: the rule of torch/sampling.py by kernels, for any number of places at once.

Waits for nothing, but that penalties, which read counts on the host, bring them to the device row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Choice
from verifier.cuda.kernels.sample import DrawRecords, sample, to_device
from verifier.rows import SamplingRows
from verifier.torch.sampling import process


def is_processed(records: NDArray[Any], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether logits are changed before the draw, for ROW_RECORDs [S] and the positions to fill [S]."""
    is_short = (positions < records["first_free"]) & (records["num_stops"] > 0)
    found: NDArray[np.bool_] = records["has_penalties"] | (records["num_biases"] > 0) | is_short
    return found


def choose_device(logits: torch.Tensor, state: SamplingRows, choice: Choice) -> torch.Tensor:
    """The target's token at each place, as verifier.torch.sampling.choose gives it.

    Args: logits [S, V] float32.
    Returns: [S] int64; -1 where the logits are not finite.
    """
    rows, positions = np.asarray(choice.rows, np.int64), np.asarray(choice.positions, np.int64)
    records = state.records[rows]
    if is_processed(records, positions).any():
        logits = _sound(logits, process(logits.double(), state, choice))
    return sample(logits, DrawRecords.make(records, positions, logits.device))


def process_lists(logits: torch.Tensor, state: SamplingRows, choice: Choice) -> torch.Tensor:
    """Bias and minimum length alone, as verifier.torch.sampling.process does them, in two writes: [S, V] float64."""
    z = logits.double()
    biased: list[tuple[int, int]] = []
    values: list[float] = []
    barred: list[tuple[int, int]] = []
    for place, (row, position) in enumerate(zip(choice.rows, choice.positions, strict=True)):
        record = state.records[row]
        count = int(record["num_biases"])
        biased += [(place, token) for token in state.bias_tokens[row, :count].tolist()]
        values += state.bias_values[row, :count].tolist()
        if position < record["first_free"]:
            barred += [(place, token) for token in state.stop_ids[row, : int(record["num_stops"])].tolist()]
    if biased:
        moved = to_device(np.array(values, np.float64).view(np.int64), z.device).view(torch.float64)
        z.index_put_(_pairs(biased, z.device), moved, accumulate=True)
    if barred:
        z.index_put_(_pairs(barred, z.device), z.new_full((), float("-inf")))
    return _sound(logits, z)


def _pairs(places: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index tensors [n] of places and tokens."""
    moved = to_device(np.array(places, np.int64).T.copy(), device)
    return moved[0], moved[1]


def _sound(logits: torch.Tensor, processed: torch.Tensor) -> torch.Tensor:
    """Processed logits; a row that was broken before stays so."""
    broken = torch.isnan(logits).any(dim=-1) | torch.isposinf(logits).any(dim=-1)
    return processed.masked_fill(broken[:, None], float("nan"))
