"""The walk by kernels: tokens are chosen at all nodes at once and followed down the trees; K/V move on the device.

One host sync, the reading of what was won. Rows with penalties are walked level by level afterwards, since what their
next token may be depends on the last.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks, walk_levels
from verifier.device_sampling import choose_device
from verifier.kernels.sample import to_device
from verifier.kernels.walk import walk
from verifier.kv import KVPool
from verifier.rows import SamplingRows
from verifier.sampling import Choice

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


def accept_kernels(
    logits: torch.Tensor,  # [K, V] float32
    walks: Walks,
    state: SamplingRows,
    write_slots: torch.Tensor,  # [N] int64
    pool: KVPool,
) -> tuple[Path, Int32]:
    """Walk all trees and move what was accepted, but for rows with penalties.

    Returns: the path, and [S] how many accepted nodes of each tree are still to be moved.
    """
    path = Path.make(walks)
    has_penalties = state.records["has_penalties"][walks.rows]  # [S] bool
    if not has_penalties.all():
        sizes = np.diff(walks.starts)
        is_free = None if not has_penalties.any() else np.repeat(~has_penalties, sizes)
        chosen = _choose_all(logits, state, (np.repeat(walks.rows, sizes), walks.positions), is_free)
        _walk_at_once(chosen, walks, path, (write_slots, pool))
    if not has_penalties.any():
        return path, np.zeros_like(path.num_accepted)
    walk_levels(logits, walks, state, (choose_device, path, np.flatnonzero(has_penalties).tolist()))
    return path, np.where(has_penalties, path.num_accepted, 0).astype(np.int32)


def _choose_all(
    logits: torch.Tensor,  # [K, V] float32
    state: SamplingRows,
    places: tuple[Int32, Int64],  # row and position of each node: [K] each
    is_free: NDArray[np.bool_] | None,  # [K] whose choice depends on no other; None for all
) -> torch.Tensor:
    """The token at every node, [K] int64; -1 where it depends on the way there."""
    rows, positions = places
    if is_free is None:
        return choose_device(logits, state, Choice(rows.tolist(), positions.tolist()))
    index = np.flatnonzero(is_free)
    where = torch.from_numpy(index).to(logits.device)
    chosen = torch.full(rows.shape, -1, dtype=torch.int64, device=logits.device)
    choice = Choice(rows[index].tolist(), positions[index].tolist())
    return chosen.index_copy_(0, where, choose_device(logits.index_select(0, where), state, choice))


def _walk_at_once(
    chosen: torch.Tensor,  # [K] int64
    walks: Walks,
    path: Path,
    memory: tuple[torch.Tensor, KVPool],  # write_slots [N] int64
) -> None:
    """Follow the chosen tokens and move the K/V; a tree whose root has none is left alone. Fills `path`."""
    num_nodes, num_trees, depth = chosen.shape[0], walks.rows.shape[0], walks.max_depth
    packed = np.empty(2 * num_nodes + num_trees + 1, np.int64)
    packed[:num_nodes], packed[num_nodes : 2 * num_nodes] = walks.tokens, walks.parents
    packed[2 * num_nodes :] = walks.starts
    moved = to_device(packed, chosen.device)
    trees, starts = moved[: 2 * num_nodes].view(2, num_nodes), moved[2 * num_nodes :]
    write_slots, pool = memory
    result = walk(chosen, trees, starts, write_slots, depth)
    if depth:
        pool.move(result.moves[0].reshape(-1), result.moves[1].reshape(-1), num_trees)
    won = result.won.cpu().numpy()  # the host sync
    path.num_accepted[:] = won[:, 0]
    path.tokens[:] = won[:, 1 : depth + 2]
    path.nodes[:] = won[:, depth + 2 :]
