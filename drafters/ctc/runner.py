"""Runs a head for the rows of a batch: reads states as they come, guesses frames when asked."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafters.base import Int32, Int64
from drafters.ctc.head import Context, Head

Float32 = NDArray[np.float32]

MAX_HEAT = 1.0
"""Highest temperature a head is trained for; above it the frames are those of this one."""


class TargetEmbeddings(Protocol):
    """What a head shares with its target."""

    @property
    def input_embedding(self) -> Tensor:
        """[V, E]"""

    @property
    def output_embedding(self) -> Tensor:
        """[V, H]"""


class HeadRunner:
    """The head's memory of every row, and its passes.

    Owns, on the head's device: keys and values of the last W accepted tokens of each row, in a ring by position, and
    the features of the last one, from which the next guess starts. Nothing is kept of a row that is stopped.
    """

    def __init__(
        self, head: Head, embeddings: TargetEmbeddings, max_rows: int, device: str, dtype: torch.dtype
    ) -> None:
        shape = head.shape
        self._head = head.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._inputs = embeddings.input_embedding
        self._outputs = embeddings.output_embedding.to(dtype)
        self._device, self._dtype = device, dtype
        ring = (max_rows, shape.num_layers, shape.num_heads, shape.window, shape.width // shape.num_heads)
        self._keys = torch.zeros(ring, dtype=dtype, device=device)
        self._values = torch.zeros(ring, dtype=dtype, device=device)
        self._places = torch.full((max_rows, shape.window), -1, dtype=torch.int64, device=device)
        self._anchors = torch.zeros((max_rows, 1, shape.width), dtype=dtype, device=device)
        self._lengths = np.full(max_rows, -1, np.int64)  # tokens of the row behind the last state read, -1 for none

    @property
    def num_rows(self) -> int:
        """Rows there is room for."""
        return int(self._lengths.size)

    @property
    def window(self) -> int:
        """Most states of a row that one `read` may bring (W)."""
        return self._head.shape.window

    def start(self, row: int) -> None:
        """Forget what the row held."""
        self._places[row] = -1
        self._lengths[row] = -1

    def length(self, row: int) -> int:
        """How many tokens the row had when its last state was read; -1 if none was. A guess goes on from there."""
        return int(self._lengths[row])

    @torch.inference_mode()
    def read(self, rows: Int32, positions: Int64, states: Tensor, tokens: Int64) -> None:
        """Take states in.

        Args, each [n]: the row of every state and the position it stood at, increasing within a row, at most W a row;
        `states` [n, H]; `tokens`, the token that followed each state, at the next position.
        """
        window = self._head.shape.window
        places = torch.from_numpy(positions + 1).to(self._device)
        ids = torch.from_numpy(tokens).to(self._device)
        features = self._head.read(states.to(self._dtype), self._inputs[ids].to(self._dtype))
        context = self._head.context(features[None], places[None])
        row_ids = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        slots = places % window
        self._keys[row_ids, :, :, slots] = context.keys[0].permute(2, 0, 1, 3)
        self._values[row_ids, :, :, slots] = context.values[0].permute(2, 0, 1, 3)
        self._places[row_ids, slots] = places
        last = np.flatnonzero(np.diff(rows, append=-1))
        self._anchors[row_ids[last], 0] = features[last]
        self._lengths[rows[last]] = positions[last] + 2

    @torch.inference_mode()
    def guess(self, rows: Int32, temperatures: NDArray[np.float64]) -> Float32:
        """Frames behind the last token read of each row: probabilities [R, T, V + 1], the blank last."""
        anchors, keys, values, places = self._of(rows)
        positions = torch.from_numpy(self._lengths[rows] - 1).to(self._device)[:, None]
        heat = torch.from_numpy(np.minimum(temperatures, MAX_HEAT)).to(self._device, self._dtype)
        behind = positions - places
        is_visible = (places >= 0) & (behind >= 0) & (behind < self._head.shape.window)
        frames = self._head.frames(anchors, positions, heat, Context(keys, values), is_visible[:, None])
        scores = self._head.logits(frames[:, 0], self._outputs)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).cpu().numpy()

    def _of(self, rows: Int32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is kept of these rows; views where they are neighbours."""
        first, count = int(rows[0]), rows.size
        if int(rows[-1]) - first == count - 1 and (count == 1 or bool((np.diff(rows) == 1).all())):
            chosen = slice(first, first + count)
            return self._anchors[chosen], self._keys[chosen], self._values[chosen], self._places[chosen]
        ids = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        return self._anchors[ids], self._keys[ids], self._values[ids], self._places[ids]
