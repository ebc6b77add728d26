"""Sampling state of the running rows, on the host.

Owns one record per row, its stop ids and biases, and the token counts that penalties need.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from verifier.plan import RowStart, SamplingParams

Int32 = NDArray[np.int32]

ROW_RECORD = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("presence", np.float64),
        ("frequency", np.float64),
        ("repetition", np.float64),
        ("top_k", np.int64),
        ("first_free", np.int64),  # position from which stop ids may be chosen
        ("num_stops", np.int64),
        ("num_biases", np.int64),
        ("has_penalties", np.bool_),
        ("is_plain_greedy", np.bool_),  # the token is the argmax of the raw logits
    ]
)


class SamplingRows:
    """Owns the sampling state of M rows."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.records: NDArray[Any] = np.zeros(max_rows, ROW_RECORD)  # [M]
        self.stop_ids: Int32 = np.zeros((max_rows, 1), np.int32)  # [M, most stop ids]
        self.bias_tokens: Int32 = np.zeros((max_rows, 1), np.int32)  # [M, most biases]
        self.bias_values = np.zeros((max_rows, 1), np.float64)  # [M, most biases]
        self.num_logprobs = np.full(max_rows, -1, np.int32)  # [M]
        # Zeroed lazily by the system: rows without penalties never touch their part.
        self.counts: Int32 = np.zeros((max_rows, vocab_size), np.int32)  # [M, V] answer tokens
        self.in_prompt = np.zeros((max_rows, vocab_size), np.bool_)  # [M, V]

    def start(self, start: RowStart) -> None:
        """A sequence moves in."""
        row, sampling = start.row, start.sampling
        record = self.records[row]
        record["seed"] = np.uint64(sampling.seed & (2**64 - 1))
        record["temperature"] = sampling.temperature
        record["top_p"] = sampling.top_p
        record["min_p"] = sampling.min_p
        record["presence"] = sampling.presence_penalty
        record["frequency"] = sampling.frequency_penalty
        record["repetition"] = sampling.repetition_penalty
        record["top_k"] = sampling.top_k
        record["first_free"] = start.num_prompt + sampling.min_tokens
        record["has_penalties"] = sampling.has_penalties
        record["is_plain_greedy"] = (
            sampling.is_greedy
            and not sampling.has_penalties
            and not sampling.logit_bias
            and not (sampling.min_tokens and sampling.stop_ids)
        )
        self.num_logprobs[row] = sampling.num_logprobs
        self._store_lists(row, sampling)
        if sampling.has_penalties:
            self.counts[row] = 0
            self.in_prompt[row] = False
            self.in_prompt[row, list(start.tokens[: start.num_prompt])] = True
            np.add.at(self.counts[row], list(start.tokens[start.num_prompt :]), 1)

    def _store_lists(self, row: int, sampling: SamplingParams) -> None:
        stops, biases = sampling.stop_ids, sampling.logit_bias
        self.stop_ids = _widen(self.stop_ids, len(stops))
        self.bias_tokens = _widen(self.bias_tokens, len(biases))
        self.bias_values = _widen(self.bias_values, len(biases))
        self.stop_ids[row, : len(stops)] = stops
        self.bias_tokens[row, : len(biases)] = [token for token, _ in biases]
        self.bias_values[row, : len(biases)] = [value for _, value in biases]
        self.records[row]["num_stops"] = len(stops)
        self.records[row]["num_biases"] = len(biases)


def _widen(array: NDArray[Any], width: int) -> NDArray[Any]:
    """The array with at least `width` columns."""
    if width <= array.shape[1]:
        return array
    wide = np.zeros((array.shape[0], width), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
