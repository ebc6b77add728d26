"""The head as a source: reads hidden states as they come, guesses frames for rows whose last state it has."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from drafters.base import Float32, HiddenStates, Int32, Int64
from drafters.coupling import Coupling
from drafters.head.frames import NO_GUESS, Guess
from drafters.head.head import Head
from drafters.head.runner import HeadRunner, TargetEmbeddings
from drafters.rows import MAX_FRAMES, RECENT, Rows


class HeadSource:
    """Owns the head's runner, and its coupling to the noise. One thread may call it."""

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
        self.runner = HeadRunner(head, embeddings, max_rows, device, dtype)
        self._coupling = coupling or Coupling.plain(head.shape.num_slots)
        self._num_frames = min(head.shape.num_slots, MAX_FRAMES)
        self.bias = bias_of(head)
        self.window = head.shape.window

    def start(self, row: int, rows: Rows, temperature: float) -> None:
        """The row begins without states: those of its prompt come with the news."""
        self.runner.start(row)
        rows[row]["factors"][:] = 1.0
        rows[row]["factors"][: self._num_frames] = self._coupling.at(temperature)[: self._num_frames]

    def read(self, hidden: HiddenStates, rows: Rows) -> None:
        """Give the runner the states whose next token is known, with those tokens."""
        ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        starts = hidden.starts.tolist()
        for index, (row, first) in enumerate(zip(hidden.rows.tolist(), hidden.first.tolist(), strict=True)):
            length = int(rows[row]["length"])
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
        places = np.array(positions, np.int64)
        following: Int64 = rows["recent"][ids, (places + 1) % RECENT]
        self.runner.read(np.array(ids, np.int32), places, states, following)

    def is_known(self, rows: Int32, facts: Rows) -> NDArray[np.bool_]:
        """Which rows [R] have their last token's state: of the others a step failed, or ran row by row."""
        lengths = np.array([self.runner.length(row) for row in rows.tolist()], np.int64)
        is_known: NDArray[np.bool_] = lengths == facts["length"][rows]
        return is_known

    def guess(self, rows: Int32, facts: Rows) -> Guess:
        """Frames behind the last token of each row. Without rows the head is not run."""
        return self.runner.guess(rows, facts["temperature"][rows]) if rows.size else NO_GUESS

    def sizes(self) -> dict[str, int]:
        """Bytes of the head's weights, and of its keys, values and features of all rows."""
        return {"head": self.runner.head_bytes, "rows": self.runner.row_bytes}

    def stop(self, row: int) -> None:
        """Forget the row."""
        self.runner.start(row)


def bias_of(head: Head) -> tuple[Float32, Float32]:
    """The previous-token bias for the compiled search: [V, rank] by the token before and by the token itself."""
    shape = head.shape
    before, after = (np.zeros((shape.vocab_size, shape.bias_rank), np.float32) for _ in range(2))
    if shape.bias_rank:
        places = head.places(torch.arange(shape.vocab_size, device=head.draft_tokens.device))
        before[:] = head.bias_from.detach()[places].float().cpu().numpy()
        after[head.draft_tokens.cpu().numpy()] = head.bias_to.detach().float().cpu().numpy()
    return before, after
