"""The head as a source: reads hidden states as they come, guesses frames for rows whose last state it has."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drafters.base import Float32, Float64, HiddenStates, Int32, Int64
from drafters.compiled import Records
from drafters.coupling import Coupling
from drafters.head.frames import MAX_TEMPERATURE, PER_FRAME, Guess
from drafters.head.head import Context, Head
from drafters.rows import MAX_FRAMES, RECENT
from verifier.cpu.fused import quicken
from verifier.cpu.products import multiplier

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


class HeadSource:
    """The head's memory of every row, and its passes. One thread may call it.

    Owns, on the head's device: keys and values of the last W accepted tokens of each row, in a ring by position, and
    the features of the last one, from which the next guess starts. Nothing is kept of a row that is stopped.
    """

    def __init__(
        self,
        head: Head,
        embeddings: TargetEmbeddings,
        coupling: Coupling | None = None,
        *,
        max_rows: int = 64,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`coupling`: how much the noise counts beside the head's estimates; None where it was not fitted."""
        shape = head.shape
        self.window = shape.window
        self._coupling = coupling or Coupling.unfitted(shape.num_slots)
        self._head = head.to(device=device, dtype=dtype).eval().requires_grad_(False)
        quicken(self._head)
        self._inputs, self.bias = embeddings.input_embedding, bias_of(self._head)
        self._device, self._dtype = device, dtype
        with torch.inference_mode():
            outputs = self._head.rows(embeddings.output_embedding).to(dtype)
            # With a draft vocabulary there must be a copy anyway: then of the product, which is narrower.
            self._is_folded = shape.draft_vocab_size > 0
            self._outputs = self._head.folded(outputs) if self._is_folded else outputs
            if self._is_folded:
                self._score = multiplier(self._outputs)
        ring = (max_rows, shape.window, shape.num_layers, shape.num_heads, shape.width // shape.num_heads)
        self._keys = torch.zeros(ring, dtype=dtype, device=device)
        self._values = torch.zeros(ring, dtype=dtype, device=device)
        self._names: Int64 = self._head.draft_tokens.cpu().numpy()[None]
        self._is_dense = device == "cpu" and shape.num_drafted <= _DENSE_VOCAB
        self._anchors = torch.zeros((max_rows, 1, shape.width), dtype=dtype, device=device)
        self._held = np.full((max_rows, shape.window), -1, np.int64)  # positions in the ring, -1 for none
        self.lengths = np.full(max_rows, -1, np.int64)
        """Tokens of each row behind the last state read, -1 for none: a guess goes on from there."""

    def start(self, row: int, records: Records, temperature: float) -> None:
        """The row begins without states: those of its prompt come with the news."""
        self.stop(row)
        fitted = self._coupling.at(temperature)[:MAX_FRAMES]
        records[row]["factors"][:] = 1.0
        records[row]["factors"][: len(fitted)] = fitted

    def stop(self, row: int) -> None:
        """Forget what the row held."""
        self._held[row] = -1
        self.lengths[row] = -1
        for memory in (self._keys, self._values, self._anchors):
            memory[row] = 0  # what is not visible weighs nothing, but nothing times infinity is no number

    def read(self, hidden: HiddenStates, records: Records) -> None:
        """Take in the states whose next token is known, with those tokens."""
        ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        starts = hidden.starts.tolist()
        for index, (row, first) in enumerate(zip(hidden.rows.tolist(), hidden.first.tolist(), strict=True)):
            length = int(records[row]["length"])
            stop = min(length - 1, first + starts[index + 1] - starts[index])
            begin = max(first, stop - self.window, length - RECENT)  # the ring would lose what is before that at once
            ids += [row] * (stop - begin)
            positions += range(begin, stop)
            kept += range(starts[index] + begin - first, starts[index] + stop - first)
        if not kept:
            return
        states = hidden.states
        if len(kept) < states.shape[0]:
            states = states[torch.tensor(kept, device=states.device)]
        stood = np.array(positions, np.int64)
        tokens: Int64 = records["recent"][ids, (stood + 1) % RECENT]
        self.take(np.array(ids, np.int32), stood, states, tokens)

    @torch.inference_mode()
    def take(self, rows: Int32, positions: Int64, states: Tensor, tokens: Int64) -> None:
        """Take states in.

        Args, each [n]: the row of every state and the position it stood at, increasing within a row, at most W a row;
        `states` [n, H]; `tokens`, the token that followed each state, at the next position.
        """
        window = self.window
        following = positions + 1
        ids = torch.from_numpy(tokens).to(self._device)
        features = self._head.read(states.to(self._dtype), self._inputs[ids].to(self._dtype))
        context = self._head.context(features[None], torch.from_numpy(following).to(self._device)[None])
        slots = torch.from_numpy(rows * np.int64(window) + following % window).to(self._device)
        for ring, new in ((self._keys, context.keys), (self._values, context.values)):
            ring.flatten(0, 1).index_copy_(0, slots, new[0].permute(2, 0, 1, 3))
        last = np.flatnonzero(np.diff(rows, append=-1))
        chosen = features if last.size == features.shape[0] else features[torch.from_numpy(last).to(self._device)]
        self._anchors[:, 0].index_copy_(0, torch.from_numpy(rows[last].astype(np.int64)).to(self._device), chosen)
        self._held[rows, following % window] = following
        self.lengths[rows[last]] = positions[last] + 2

    @torch.inference_mode()
    def guess(self, rows: Int32, temperatures: Float64) -> Guess:
        """Frames behind the last token read of each row; of large draft vocabularies only each frame's best tokens."""
        positions = self.lengths[rows, None] - 1
        behind = positions - self._held[rows]
        is_visible = (self._held[rows] >= 0) & (behind >= 0) & (behind < self.window)
        ids = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        rings = (ring.index_select(0, ids).permute(0, 2, 3, 1, 4) for ring in (self._keys, self._values))
        slots = self._head.slot_states(
            self._anchors.index_select(0, ids),
            torch.from_numpy(positions).to(self._device),
            torch.from_numpy(np.minimum(temperatures, MAX_TEMPERATURE)).to(self._device, self._dtype),
            Context(*rings),
            torch.from_numpy(is_visible[:, None]).to(self._device),
        )
        if self._is_folded:
            scores = self._score(slots[:, 0])
            scores[..., -1] += self._head.to_blank.bias
        else:
            scores = self._head.logits(slots[:, 0], self._outputs)
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if self._is_dense:
            return self._names, probabilities.cpu().numpy()
        best = probabilities[..., :-1].topk(PER_FRAME, dim=-1).indices.flatten(1)  # [R, T * PER_FRAME]
        chosen = best[:, None].expand(-1, probabilities.shape[1], -1)
        picked = torch.cat([probabilities.gather(2, chosen), probabilities[..., -1:]], dim=-1)
        return self._head.draft_tokens[best].cpu().numpy(), picked.cpu().numpy()

    def sizes(self) -> dict[str, int]:
        """Bytes of the head's weights, bias and copy of output rows; and of keys, values and features of the rows."""
        weights = [*self._head.parameters(), *self._head.buffers(), *([self._outputs] if self._is_folded else [])]
        head_bytes = sum(weight.nbytes for weight in weights) + sum(array.nbytes for array in self.bias)
        return {"head": head_bytes, "rows": self._keys.nbytes + self._values.nbytes + self._anchors.nbytes}


def bias_of(head: Head) -> tuple[Float32, Float32]:
    """The previous-token bias for the compiled search: [V, rank] by the token before and by the token itself."""
    shape = head.shape
    before, after = (np.zeros((shape.vocab_size, shape.bias_rank), np.float32) for _ in range(2))
    if shape.bias_rank:
        places = head.places(torch.arange(shape.vocab_size, device=head.draft_tokens.device))
        before[:] = head.bias_from.detach()[places].float().cpu().numpy()
        after[head.draft_tokens.cpu().numpy()] = head.bias_to.detach().float().cpu().numpy()
    return before, after
