"""The device's sampler: the rule of sampling.py by kernels, for any number of places at once, without a host sync."""

from __future__ import annotations

import numpy as np
import torch

from verifier.kernels.sample import DrawRecords, sample
from verifier.rows import SamplingRows
from verifier.sampling import Choice, process


def choose_device(logits: torch.Tensor, state: SamplingRows, choice: Choice) -> torch.Tensor:
    """The target's token at each place, as verifier.sampling.choose gives it.

    Args: logits [S, V] float32.
    Returns: [S] int64; -1 where the logits are not finite.
    """
    rows, positions = np.asarray(choice.rows, np.int64), np.asarray(choice.positions, np.int64)
    records = state.records[rows]
    is_processed = (
        records["has_penalties"]
        | (records["num_biases"] > 0)
        | ((positions < records["first_free"]) & (records["num_stops"] > 0))
    )
    if not is_processed.any():
        return sample(logits, DrawRecords.make(records, positions, logits.device))
    tokens = torch.empty(rows.shape[0], dtype=torch.int64, device=logits.device)
    for places in (np.flatnonzero(~is_processed), np.flatnonzero(is_processed)):
        if places.size:
            index = torch.from_numpy(places).to(logits.device)  # [places] int64
            z = logits.index_select(0, index)
            made = DrawRecords.make(records[places], positions[places], logits.device)
            if is_processed[places[0]]:
                z = _process(z, state, Choice(rows[places].tolist(), positions[places].tolist()))
            tokens.index_copy_(0, index, sample(z, made))
    return tokens


def _process(logits: torch.Tensor, state: SamplingRows, choice: Choice) -> torch.Tensor:
    """Penalties, bias and minimum length: [S, V] float64. A row that was broken before them stays so."""
    broken = torch.isnan(logits).any(dim=-1) | torch.isposinf(logits).any(dim=-1)
    return process(logits.double(), state, choice).masked_fill(broken[:, None], float("nan"))
