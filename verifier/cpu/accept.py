"""The walk on the host: the rule of verifier.accept.accept_device for the whole batch in one Numba call."""

from __future__ import annotations

import numpy as np
import torch

from verifier.accept import Float32, Int32, Path, Walks
from verifier.cpu.sampling import argmax_finite, choose_host, top_candidates
from verifier.jit import jit
from verifier.rows import SamplingRows
from verifier.torch.accept import Candidates


class HostWalker:
    """Walks logits that lie in the host's memory: see verifier.torch.accept.Walker."""

    def __init__(self, state: SamplingRows) -> None:
        self._state = state

    def accept(self, logits: torch.Tensor, walks: Walks, best: Int32 | None) -> Path:
        """See Walker."""
        return accept_host(logits.numpy(), walks, self._state, best)

    def candidates(self, logits: torch.Tensor, count: int) -> Candidates:
        """See Walker."""
        array = logits.numpy()
        tokens, values = np.empty((array.shape[0], count), np.int32), np.empty((array.shape[0], count), np.float32)
        top_candidates(array, array.view(np.int32), tokens, values)
        return tokens, values


def accept_host(logits: Float32, walks: Walks, state: SamplingRows, best: Int32 | None) -> Path:
    """Walk all trees on the host. `best` [n <= K] is the argmax of the first n nodes, if known."""
    path = Path.make(walks)
    _walk_all(
        (logits, logits.view(np.int32)),
        (walks.rows, walks.starts, walks.tokens, walks.parents, walks.positions),
        (state.records, state.stop_ids, state.bias_tokens, state.bias_values, state.counts, state.in_prompt),
        np.empty(0, np.int32) if best is None else best,
        (path.tokens, path.num_accepted, path.nodes),
    )
    return path


@jit()
def _walk_all(logits, walks, state, best, out):  # type: ignore[no-untyped-def]
    logits, bits = logits
    rows, starts, tokens, parents, positions = walks
    records, stop_ids, bias_tokens, bias_values, counts, in_prompt = state
    out_tokens, out_accepted, out_nodes = out
    z = np.empty(logits.shape[1], np.float64)
    for tree in range(rows.shape[0]):
        row = rows[tree]
        record = records[row]
        start, stop = starts[tree], starts[tree + 1]
        node, won = start, 0
        while True:
            if record.is_plain_greedy:
                token = best[node] if node < best.shape[0] else argmax_finite(bits[node])
            else:
                lists = (stop_ids[row], bias_tokens[row], bias_values[row])
                token = choose_host(
                    logits[node], bits[node], positions[node], record, lists, (counts[row], in_prompt[row]), z
                )
            if token < 0:
                won = 0
                break
            out_tokens[tree, won] = token
            won += 1
            if record.has_penalties:
                counts[row, token] += 1
            child = -1
            for candidate in range(node + 1, stop):
                if parents[candidate] == node - start and tokens[candidate] == token:
                    child = candidate
                    break
            if child < 0:
                break
            out_nodes[tree, won - 1] = child - start
            node = child
        out_accepted[tree] = won - 1
