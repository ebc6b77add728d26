"""Runs a head for the rows of a batch: reads states as they come, guesses frames when asked."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from drafters.base import Int32, Int64
from drafters.head.frames import MAX_TEMPERATURE, PER_FRAME, Guess
from drafters.head.head import Context, Head

_DENSE_VOCAB = 8192
"""Larger draft vocabularies, and any that lies on a device, are not looked at whole by the host."""


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
        self._device, self._dtype = device, dtype
        with torch.inference_mode():
            rows = self._head.rows(embeddings.output_embedding).to(dtype)
            # With a draft vocabulary there must be a copy anyway: then of the product, which is narrower.
            self._is_folded = shape.draft_vocab_size > 0
            self._outputs = self._head.folded(rows) if self._is_folded else rows
        ring = (max_rows, shape.window, shape.num_layers, shape.num_heads, shape.width // shape.num_heads)
        self._keys = torch.zeros(ring, dtype=dtype, device=device)
        self._values = torch.zeros(ring, dtype=dtype, device=device)
        self._tokens = self._head.draft_tokens
        self._names: Int64 = self._tokens.cpu().numpy()[None]
        self._is_dense = device == "cpu" and shape.num_drafted <= _DENSE_VOCAB
        self._anchors = torch.zeros((max_rows, 1, shape.width), dtype=dtype, device=device)
        self._places = np.full((max_rows, shape.window), -1, np.int64)  # positions in the ring, -1 for none
        self._lengths = np.full(max_rows, -1, np.int64)  # tokens of the row behind the last state read, -1 for none

    @property
    def window(self) -> int:
        """Most states of a row that one `read` may bring (W)."""
        return self._head.shape.window

    @property
    def head_bytes(self) -> int:
        """Size of the head's own weights and of its copy of output rows, not of what it shares with the target."""
        weights = [*self._head.parameters(), *self._head.buffers()]
        return sum(weight.nbytes for weight in weights) + (self._outputs.nbytes if self._is_folded else 0)

    @property
    def row_bytes(self) -> int:
        """Size of what is remembered of all rows."""
        return self._keys.nbytes + self._values.nbytes + self._anchors.nbytes

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
        places = positions + 1
        ids = torch.from_numpy(tokens).to(self._device)
        features = self._head.read(states.to(self._dtype), self._inputs[ids].to(self._dtype))
        context = self._head.context(features[None], torch.from_numpy(places).to(self._device)[None])
        slots = torch.from_numpy(rows * np.int64(window) + places % window).to(self._device)
        for ring, new in ((self._keys, context.keys), (self._values, context.values)):
            ring.flatten(0, 1).index_copy_(0, slots, new[0].permute(2, 0, 1, 3))
        last = np.flatnonzero(np.diff(rows, append=-1))
        chosen = features if last.size == features.shape[0] else features[torch.from_numpy(last).to(self._device)]
        self._anchors[:, 0].index_copy_(0, torch.from_numpy(rows[last].astype(np.int64)).to(self._device), chosen)
        self._places[rows, places % window] = places
        self._lengths[rows[last]] = positions[last] + 2

    @torch.inference_mode()
    def guess(self, rows: Int32, temperatures: NDArray[np.float64]) -> Guess:
        """Frames behind the last token read of each row; of large draft vocabularies only each frame's best tokens."""
        positions = self._lengths[rows, None] - 1
        behind = positions - self._places[rows]
        is_visible = (self._places[rows] >= 0) & (behind >= 0) & (behind < self._head.shape.window)
        ids = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        rings = (ring.index_select(0, ids).permute(0, 2, 3, 1, 4) for ring in (self._keys, self._values))
        frames = self._head.frames(
            self._anchors.index_select(0, ids),
            torch.from_numpy(positions).to(self._device),
            torch.from_numpy(np.minimum(temperatures, MAX_TEMPERATURE)).to(self._device, self._dtype),
            Context(*rings),
            torch.from_numpy(is_visible[:, None]).to(self._device),
        )
        scores = self._scores(frames[:, 0])
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if self._is_dense:
            return self._names, probabilities.cpu().numpy()
        best = probabilities[..., :-1].topk(PER_FRAME, dim=-1).indices.flatten(1)  # [R, T * PER_FRAME]
        chosen = best[:, None].expand(-1, probabilities.shape[1], -1)
        picked = torch.cat([probabilities.gather(2, chosen), probabilities[..., -1:]], dim=-1)
        return self._tokens[best].cpu().numpy(), picked.cpu().numpy()

    def _scores(self, frames: Tensor) -> Tensor:
        """Scores [R, T, N + 1] of frames [R, T, d]."""
        if not self._is_folded:
            return self._head.logits(frames, self._outputs)
        scores = functional.linear(frames, self._outputs)
        scores[..., -1] += self._head.to_blank.bias
        return scores
