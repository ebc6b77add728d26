"""Finds the places where Python code would wait for a device, on a machine that has none.

On a CPU nothing waits, but the calls that would are there: reading a tensor, copying memory that is not pinned,
indexing with lists or masks. What Triton's interpreter does inside of a kernel is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

READS = ("cpu", "tolist", "item", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
MAKERS = ("tensor", "as_tensor", "from_numpy")


@contextmanager
def watched(monkeypatch: Any) -> Iterator[list[tuple[str, str]]]:
    """(call, function that made it) of every call that would wait."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[tuple[str, str]] = []
    depth = [0]

    def note(name: str) -> None:
        if not depth[0]:
            found.append((name, sys._getframe(2).f_code.co_qualname.removesuffix(".<locals>.<listcomp>")))

    def noting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(name)
            depth[0] += 1
            try:
                return plain(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    def indexing(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, index: Any, *value: Any) -> Any:
            for part in index if isinstance(index, tuple) else (index,):
                if isinstance(part, list | np.ndarray) or (isinstance(part, torch.Tensor) and part.dtype == torch.bool):
                    note("index")
            return plain(tensor, index, *value)

        return call

    run = InterpretedFunction.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            return run(self, *args, **kwargs)
        finally:
            depth[0] -= 1

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        for name in MAKERS:
            patch.setattr(torch, name, noting(name, getattr(torch, name)))
        for name in ("__getitem__", "__setitem__"):
            patch.setattr(torch.Tensor, name, indexing(getattr(torch.Tensor, name)))
        patch.setattr(InterpretedFunction, "run", launch)
        yield found
