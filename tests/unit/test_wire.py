"""What ranks tell each other arrives as it was told, in pieces of any size."""

from __future__ import annotations

import dataclasses
import socket
import threading

import numpy as np
import pytest

from server.worker.apart import is_device_lost
from verifier.parallel.wire import Closed, Kind, RankLost, Told, Wire, decode_arrays, encode_arrays
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees


def some_trees() -> DraftTrees:
    """Two trees in arrays with more room than they need."""
    trees = DraftTrees.allocate(4)
    trees.append([5, 6, 7, 8], [-1, 0, 0, 2], [1.0, 0.5, 0.4, 0.1], [0, 1, 1, 1])
    trees.append(list(range(64)), [-1, *range(63)], [1.0] * 64, [0] * 64)  # its last node has a negative bit set
    return trees


def test_a_step_is_packed_from_what_was_told() -> None:
    trees = some_trees()
    plan = StepPlan(
        starts=(RowStart(9, (1, 2), 2, SamplingParams(max_tokens=1, seed=1)),),
        pages=((3, 0, 17), (3, 1, 18), (0, 5, 2)),
        trees=(TreeSlot(3, 40, 4), TreeSlot(0, 7, 64)),
        chunks=(Chunk(1, 0, (4, 5, 6), False, (5, 6)), Chunk(2, 16, (9,), True)),
    )
    told = Told.decode(Told(plan, trees, 3).encode())
    assert told.plan == dataclasses.replace(plan, starts=())  # sampling is rank 0's alone
    assert told.hidden_tail == 3
    assert told.trees.num_rows == 2
    assert told.trees.num_nodes == 68
    for name in ("tokens", "parents", "depths", "ancestors"):
        theirs, ours = getattr(told.trees, name), getattr(trees, name)[:68]
        assert theirs.dtype == ours.dtype
        assert np.array_equal(theirs, ours), name
    assert np.array_equal(told.trees.row_starts, trees.row_starts[:3])


def test_a_step_without_trees_or_without_chunks() -> None:
    nothing = Told.decode(Told(StepPlan(chunks=(Chunk(0, 0, (1,), True),)), DraftTrees.allocate(1)).encode())
    assert nothing.plan == StepPlan(chunks=(Chunk(0, 0, (1,), True),))
    assert nothing.trees.num_rows == nothing.trees.num_nodes == 0
    bare = DraftTrees.allocate(1)
    bare.append_root(7)
    assert Told.decode(Told(StepPlan(trees=(TreeSlot(0, 3, 1),)), bare).encode()).plan.chunks == ()


def test_arrays_of_any_size_and_type_come_back_as_int64() -> None:
    arrays = [np.array([1, -2], np.int32), np.empty(0, np.int64), np.array([True]), np.arange(5)]
    found = decode_arrays(encode_arrays(arrays))
    assert [array.tolist() for array in found] == [array.tolist() for array in arrays]
    assert all(array.dtype == np.int64 for array in found)
    assert decode_arrays(encode_arrays([])) == []


def test_a_frame_larger_than_the_socket_takes_and_the_end_of_it() -> None:
    ours, theirs = socket.socketpair()
    body = bytes(range(256)) * 2**14
    sender = threading.Thread(target=Wire(ours).send, args=(Kind.STEP, body))
    sender.start()
    wire = Wire(theirs)
    assert wire.receive() == (Kind.STEP, body)
    sender.join()
    ours.sendall(b"\x04")
    ours.close()
    with pytest.raises(Closed):
        wire.receive()
    with pytest.raises(Closed):
        wire.send(Kind.MOVE, body)
    theirs.close()


def test_a_lost_rank_is_a_lost_device() -> None:
    assert is_device_lost(RankLost("rank 1 ended"))
