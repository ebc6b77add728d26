"""What a device step tells beside its tokens, and the one place where the host waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks
from verifier.cuda.kernels.sample import to_device
from verifier.verdict import TokenLogprobs

_CHUNK_NUMBERS = 4 * 2**20
"""Logits that are made float64 at a time."""


def read_back(tensors: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    """Bring tensors to the host; waits once, for all of them. On a CPU the arrays share their memory."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    found = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for place, tensor in zip(found, tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    done.synchronize()
    return [place.numpy() for place in found]


def candidates_of(logits: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The `count` best tokens at each node of logits [N, V]: [N, count] int32, and their logits float32."""
    best = logits.topk(min(count, logits.shape[1]), dim=-1)
    return [best.indices.int(), best.values]


def logprobs_of(
    logits: torch.Tensor,  # [K, V] float32
    nodes: torch.Tensor,  # [n] int64
    tokens: torch.Tensor,  # [n] int64, -1 where there is none
    count: int,
) -> list[torch.Tensor]:
    """Raw log-probabilities at nodes: of the tokens [n] float64, and the `count` best, [n, count] int64 and float64."""
    count = min(count, logits.shape[1])
    step = max(1, _CHUNK_NUMBERS // logits.shape[1])
    parts: list[list[torch.Tensor]] = []
    for first in range(0, nodes.shape[0], step):
        raw = torch.log_softmax(logits.index_select(0, nodes[first : first + step]).double(), dim=-1)
        best = raw.topk(count, dim=-1)
        own = raw.gather(1, tokens[first : first + step].clamp(min=0)[:, None])[:, 0]
        parts.append([own, best.indices, best.values])
    return [torch.cat(list(column)) for column in zip(*parts, strict=True)]


class LogprobRequest:
    """Log-probabilities of the tokens that some of the walked rows win, asked for where those rows may win them.

    Owns the list of nodes, in packed order.
    """

    def __init__(self, walks: Walks, num_logprobs: NDArray[np.int32], trees: NDArray[np.int64]) -> None:
        """`num_logprobs` [S] of the walked rows; `trees` are indices of those to ask for."""
        self._num = num_logprobs
        self._first: dict[int, int] = {}
        nodes: list[NDArray[np.int64]] = []
        count = 0
        for tree in trees.tolist():
            start, stop = int(walks.starts[tree]), int(walks.starts[tree + 1])
            self._first[tree] = count
            nodes.append(np.arange(start, stop, dtype=np.int64))
            count += stop - start
        self.nodes: NDArray[np.int64] = np.concatenate(nodes) if nodes else np.zeros(0, np.int64)
        self.most = max((int(num_logprobs[tree]) for tree in trees.tolist()), default=0)

    def ask(self, logits: torch.Tensor, chosen: torch.Tensor) -> list[torch.Tensor]:
        """What is to be read back, from logits [K, V] and the tokens chosen at nodes [K]; nothing if nobody asks."""
        if not self._first:
            return []
        nodes = to_device(self.nodes, logits.device)
        return logprobs_of(logits, nodes, chosen.index_select(0, nodes), self.most)

    def answer(self, arrays: Sequence[NDArray[Any]], path: Path) -> dict[int, list[TokenLogprobs]]:
        """By index of the walk, one entry for each won token of a sound row; `arrays` as `ask` gave them, read back."""
        found: dict[int, list[TokenLogprobs]] = {}
        for tree, first in self._first.items():
            num_accepted = int(path.num_accepted[tree])
            if num_accepted < 0:
                continue
            own, tokens, values = arrays
            count = int(self._num[tree])
            places = [first, *(first + path.nodes[tree, :num_accepted]).tolist()]
            found[tree] = [
                TokenLogprobs(
                    float(own[place]),
                    tuple(zip(tokens[place, :count].tolist(), values[place, :count].tolist(), strict=True)),
                )
                for place in places
            ]
        return found
