"""A recorder for the CPU that replays as a CUDA graph does: the same operations, on the same memory, with the same
numbers.

What a graph freezes is frozen here too: grids, scalars, shapes and addresses are those of the recorded run, and no
Python of the recorded callable runs again. So a wrong address, an array that is not brought up to date, wrong padding
or a number that should have been read from memory comes out as wrong text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

Replay = Callable[[], None]


class Tape(TorchDispatchMode):
    """Owns what a run did, as calls that do it again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Replay] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when a stream is capturing: {func}")
        results = [one for one in tree_flatten(found)[0] if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage().data_ptr() for one in tree_flatten((args, kwargs))[0] if _is_tensor(one)}
        # What a call makes anew is written over at every replay; views and what is changed in place are there already.
        new = [index for index, one in enumerate(results) if one.untyped_storage().data_ptr() not in known]

        def again() -> None:
            made = [one for one in tree_flatten(func(*args, **kwargs))[0] if isinstance(one, torch.Tensor)]
            for index in new:
                results[index].copy_(made[index])

        if "empty" not in func.__name__:  # its content means nothing, here or there
            self.calls.append(again)
        return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class TapeRecorder:
    """Owns the number of its recordings, and how many there may be."""

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.num_recorded = 0
        self.num_replayed = 0

    @property
    def has_room(self) -> bool:
        return self.num_recorded < self.most

    def record(self, run: Replay) -> Replay:
        tape = Tape()
        with _launches_on(tape), tape:
            run()
        self.num_recorded += 1
        calls = tape.calls

        def replay() -> None:
            self.num_replayed += 1
            for call in calls:
                call()

        return replay


@contextmanager
def _launches_on(tape: Tape) -> Iterator[None]:
    """Launches of kernels go onto the tape as one call each; what the interpreter does in them does not."""
    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        def again() -> None:
            plain(self, *args, **kwargs)

        tape.calls.append(again)
        with _disable_current_modes():
            return plain(self, *args, **kwargs)

    InterpretedFunction.run = launch
    try:
        yield
    finally:
        InterpretedFunction.run = plain
