"""What the ranks of a split model tell each other, over a stream socket: frames of a kind and bytes.

A frame is one byte of kind, then the body. Only numbers and JSON cross it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verifier.ipc import HEADER_BYTES, framed, length_of
from verifier.plan import Chunk, StepPlan, TreeSlot
from verifier.tree import DraftTrees, Int64


class RankLost(Exception):
    """A rank died, hung, or fell out of step: only new processes can run the model again."""


class Closed(Exception):
    """The other end of a wire is gone."""


class Kind(IntEnum):
    """What a frame says."""

    OPTIONS = 1  # rank 0: what to load
    NUMBER = 2  # a rank's number; from rank 0 the least of all ranks'
    ERROR = 3  # a rank cannot load
    STEP = 4  # rank 0: run this pass
    MOVE = 5  # rank 0: move K/V
    WEIGHTS = 6  # rank 0: show the embeddings


class Wire:
    """One end of a socket between two ranks. Owns it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send a frame. Raises: Closed."""
        try:
            self.socket.sendall(framed(bytes([kind]) + body))
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self) -> tuple[Kind, bytes]:
        """Wait for a frame. Raises: Closed."""
        body = self._read(length_of(self._read(HEADER_BYTES)))
        return Kind(body[0]), body[1:]

    def _read(self, count: int) -> bytes:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            try:
                num = self.socket.recv_into(view[done:])
            except OSError as error:
                raise Closed(str(error)) from error
            if not num:
                raise Closed("the other end is gone")
            done += num
        return bytes(data)


def encode_arrays(arrays: Sequence[NDArray[Any]]) -> bytes:
    """Arrays [n] of whole numbers, as int64."""
    sizes = np.array([len(arrays), *(array.size for array in arrays)], np.int64)
    return b"".join([sizes.tobytes(), *(array.astype(np.int64, copy=False).tobytes() for array in arrays)])


def decode_arrays(body: bytes) -> list[Int64]:
    """What `encode_arrays` was given."""
    values = np.frombuffer(body, np.int64)
    first = 1 + int(values[0])
    return np.split(values[first:], np.cumsum(values[1 : first - 1])) if first > 1 else []


@dataclass(frozen=True, slots=True)
class Told:
    """What a step is packed from: no sampling state, no scores; whoever holds the page table applies `plan.pages`."""

    plan: StepPlan
    trees: DraftTrees
    hidden_tail: int = 0

    def encode(self) -> bytes:
        """The body of a STEP frame."""
        plan, trees, num_nodes = self.plan, self.trees, self.trees.num_nodes
        slots = [(slot.row, slot.num_cached, slot.max_nodes) for slot in plan.trees]
        chunks = [
            (chunk.row, chunk.num_cached, chunk.is_last, len(chunk.tokens), len(chunk.targets)) for chunk in plan.chunks
        ]
        tokens = [token for chunk in plan.chunks for token in (*chunk.tokens, *chunk.targets)]
        numbers = [[self.hidden_tail], *(np.ravel(one) for one in (plan.pages, slots, chunks, tokens))]
        packed = (trees.tokens, trees.parents, trees.depths, trees.ancestors)
        return encode_arrays(
            [
                *(np.asarray(one, np.int64) for one in numbers),
                trees.row_starts[: trees.num_rows + 1],
                *(array[:num_nodes] for array in packed),
            ]
        )

    @classmethod
    def decode(cls, body: bytes) -> Told:
        """What `encode` was told of."""
        tail, pages, slots, chunks, tokens, row_starts, *packed = decode_arrays(body)
        heads = chunks.reshape(-1, 5).tolist()
        stops = np.cumsum([0, *(length + scored for *_, length, scored in heads)]).tolist()
        words = tokens.tolist()
        plan = StepPlan(
            pages=tuple((row, index, page) for row, index, page in pages.reshape(-1, 3).tolist()),
            trees=tuple(TreeSlot(row, cached, most) for row, cached, most in slots.reshape(-1, 3).tolist()),
            chunks=tuple(
                Chunk(
                    row,
                    cached,
                    tuple(words[start : start + length]),
                    bool(is_last),
                    tuple(words[start + length : start + length + scored]),
                )
                for (row, cached, is_last, length, scored), start in zip(heads, stops, strict=False)
            ),
        )
        num_nodes = packed[0].size
        trees = DraftTrees(
            tokens=packed[0],
            parents=packed[1].astype(np.int32),
            depths=packed[2].astype(np.int32),
            ancestors=packed[3],
            scores=np.ones(num_nodes, np.float32),
            sources=np.zeros(num_nodes, np.int8),
            row_starts=row_starts.astype(np.int32),
            num_rows=row_starts.size - 1,
        )
        return cls(plan, trees, int(tail[0]))
