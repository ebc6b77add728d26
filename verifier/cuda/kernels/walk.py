"""The walk on the device: from the tokens chosen at all nodes to what each tree won, and where its K/V go."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from verifier.cuda.kernels import OPTIONS

_MOST_NODES = 64


@triton.jit(do_not_specialize=["num_trees", "depth"])
def walk_kernel(
    chosen,  # [K] int64
    node_tokens,  # [K] int64
    node_parents,  # [K] int64
    starts,  # [S + 1] int64
    write_slots,  # [N] int64, the first K of them of the nodes
    won,  # [S, 2 * depth + 2] int64: accepted, tokens, nodes
    moves,  # [2, S, depth] int64: slots to copy from and to
    num_trees,
    depth,
    most_nodes: tl.constexpr,
):
    """One tree. Grid: (S,). A level without an accepted node moves the root's slot to itself.

    A tree without nodes, which pads a step to a bucket, wins nothing and moves slot 0 to itself.
    """
    tree = tl.program_id(0)
    start, stop = tl.load(starts + tree), tl.load(starts + tree + 1)
    node = tl.arange(0, most_nodes)
    is_node = start + node < stop
    tokens = tl.load(node_tokens + start + node, mask=is_node, other=-1)
    parents = tl.load(node_parents + start + node, mask=is_node, other=-2)
    out = won + tree * (2 * depth + 2)
    root_slot = tl.load(write_slots + start, mask=start < stop, other=0)
    for level in range(0, depth):
        tl.store(moves + tree * depth + level, root_slot)
        tl.store(moves + (num_trees + tree) * depth + level, root_slot)
    here = tl.full([], 0, tl.int32)
    num_accepted = tl.full([], 0, tl.int32)
    is_going = (start < stop).to(tl.int32)
    while is_going != 0:
        token = tl.load(chosen + start + here)
        tl.store(out + 1 + num_accepted, token)
        is_child = (parents == here) & (tokens == token) & (token >= 0)
        child = tl.min(tl.where(is_child, node, most_nodes), axis=0)
        is_going = ((child < most_nodes) & (num_accepted < depth)).to(tl.int32)
        if is_going != 0:
            tl.store(out + depth + 2 + num_accepted, child.to(tl.int64))
            place = tree * depth + num_accepted
            tl.store(moves + place, tl.load(write_slots + start + child))
            tl.store(moves + num_trees * depth + place, tl.load(write_slots + start + num_accepted + 1))
            here = child
            num_accepted += 1
        elif token < 0:
            num_accepted = -1
    tl.store(out, num_accepted.to(tl.int64))


@dataclass(frozen=True, slots=True)
class DeviceWalk:
    """Where the walks led, still on the device."""

    won: torch.Tensor  # [S, 2 * depth + 2] int64: accepted (-1 in a broken tree), tokens [depth + 1], nodes [depth]
    moves: torch.Tensor  # [2, S, depth] int64: slots to copy from and to, one group to a tree


def walk(
    chosen: torch.Tensor,  # [K] int64
    nodes: tuple[torch.Tensor, torch.Tensor],  # [K] int64 each: tokens, parents
    starts: torch.Tensor,  # [S + 1] int64
    write_slots: torch.Tensor,  # [N] int64
    won: torch.Tensor,  # [S, 2 * depth + 2] int64
) -> DeviceWalk:
    """Follow the chosen tokens down every tree, as verifier.tree.walk does one tree at a time, and fill `won`.

    Node i of a tree lies in slot write_slots[start + i]. The slot of its place in the sequence, should it be accepted
    at depth d, is that of node d, so no page table is needed. What lies behind a row's last token is not defined.
    """
    num_trees, depth = won.shape[0], won.shape[1] // 2 - 1
    assert starts.shape[0] == num_trees + 1, f"{starts.shape[0]} starts for {num_trees} trees"
    moves = chosen.new_empty((2, num_trees, depth))
    walk_kernel[(num_trees,)](
        chosen, *nodes, starts, write_slots, won, moves, num_trees, depth, _MOST_NODES, num_warps=1, **OPTIONS
    )
    return DeviceWalk(won, moves)
