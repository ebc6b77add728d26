"""The walk by kernels: tokens are chosen at all nodes at once and followed down the trees; K/V move on the device.

Nothing here waits for the device. Rows with penalties are left out: what their next token may be depends on the last,
so they are walked level by level afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Choice, Path, Walks
from verifier.cuda.inputs import DeviceInputs
from verifier.cuda.kernels.sample import DrawRecords, draw_flags, sample, to_device
from verifier.cuda.kernels.walk import walk
from verifier.cuda.sampling import is_processed, process_lists
from verifier.kv import KVPool
from verifier.rows import SamplingRows

Int64 = NDArray[np.int64]

GREEDY, DRAWN = (False, False), (True, True)
"""Flags of draws (see draw_flags) for any step without noise, and for any step at all."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the device found, still on the device."""

    won: torch.Tensor  # [S, 2 * depth + 2] int64, as verifier.cuda.kernels.walk fills it
    chosen: torch.Tensor  # [K] int64, the token at every node; -1 where logits are broken or a row has penalties


def judge(
    logits: torch.Tensor,  # [K, V] float32
    inputs: DeviceInputs,
    flags: tuple[bool, bool],
    pool: KVPool,
    out: Judgement,
) -> None:
    """Choose at K nodes, walk S trees, move what was accepted, and fill `out`. A graph can be made of it."""
    num_nodes = logits.shape[0]
    records = DrawRecords(inputs.reals[:num_nodes], inputs.counts[:num_nodes], *flags)
    out.chosen.copy_(sample(logits, records))
    follow(inputs, pool, out)


def follow(inputs: DeviceInputs, pool: KVPool, out: Judgement) -> None:
    """Walk S trees along out.chosen [K], move what was accepted, and fill out.won."""
    num_trees, depth = out.won.shape[0], out.won.shape[1] // 2 - 1
    nodes = inputs.tokens, inputs.parents
    result = walk(out.chosen, nodes, inputs.starts[: num_trees + 1], inputs.write_slots, out.won)
    if depth:
        pool.move(result.moves[0].reshape(-1), result.moves[1].reshape(-1), num_trees)


def judge_lists(
    logits: torch.Tensor, inputs: DeviceInputs, walks: Walks, state: SamplingRows, pool: KVPool
) -> Judgement:
    """As `judge`, also for rows whose logits are changed first: by biases, by a minimum length. Never recorded.

    A tree of a row with penalties is left alone: its root has no token, which looks as if it were broken.
    """
    num_nodes, num_trees = logits.shape[0], walks.rows.shape[0]
    rows = np.repeat(walks.rows, np.diff(walks.starts))  # [K]
    records = state.records[rows]
    flags = draw_flags(records)
    draws = DrawRecords(inputs.reals[:num_nodes], inputs.counts[:num_nodes], *flags)
    width = 2 * walks.max_depth + 2
    out = Judgement(draws.counts.new_empty((num_trees, width)), sample(logits, draws))
    has_penalties = records["has_penalties"]
    places = np.flatnonzero(is_processed(records, walks.positions) & ~has_penalties)
    if places.size:
        index = to_device(places, logits.device)
        choice = Choice(rows[places].tolist(), walks.positions[places].tolist())
        z = process_lists(logits.index_select(0, index), state, choice)
        part = DrawRecords(draws.reals.index_select(0, index), draws.counts.index_select(0, index), *flags)
        out.chosen.index_copy_(0, index, sample(z, part))
    left_out = np.flatnonzero(has_penalties)
    if left_out.size:
        out.chosen.index_fill_(0, to_device(left_out, logits.device), -1)
    follow(inputs, pool, out)
    return out


def path_of(won: Int64, walks: Walks) -> Path:
    """The path of trees S from `won` [>= S, 2 * depth + 2] on the host; its depth is at least that of the walks."""
    path, depth = Path.make(walks), won.shape[1] // 2 - 1
    num_trees = walks.rows.shape[0]
    path.num_accepted[:] = won[:num_trees, 0]
    path.tokens[:] = won[:num_trees, 1 : walks.max_depth + 2]
    path.nodes[:] = won[:num_trees, depth + 2 : depth + 2 + walks.max_depth]
    return path
