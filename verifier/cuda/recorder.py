"""Recordings of work on a device: made once, replayed without the host's part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]

_NUM_TRIALS = 2
"""Runs before a recording: kernels are compiled and libraries take their workspace on first use."""
_LEAST_FREE_SHARE = 0.04
"""Part of the device's memory that recordings leave free: a step that is not recorded needs some too."""


class Recorder(Protocol):
    """Records what a callable does to memory that stays where it is."""

    @property
    def has_room(self) -> bool:
        """Whether there is memory for one more recording."""
        ...

    def record(self, run: Replay) -> Replay:
        """Run `run` some times and record it. Returns: what does the same once more, over what the memory then holds.

        Raises: whatever `run` raises, or the device if it does something that cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records CUDA graphs. Owns the memory they share and the side stream on which they are made.

    Graphs share their scratch memory, so only one may run at a time, and what one leaves there the next one overwrites:
    results belong in memory from outside of a recording.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def has_room(self) -> bool:
        """Whether enough of the device's memory is free, or is held by the allocator for nobody."""
        free, total = torch.cuda.mem_get_info(self._device)
        idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + idle > _LEAST_FREE_SHARE * total

    def record(self, run: Replay) -> Replay:
        """See Recorder. Other threads may go on using the device meanwhile."""
        # The stream is entered here as well: a graph whose end raises would leave it the current one.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_NUM_TRIALS):
                    run()
                self._stream.synchronize()  # a kernel that faults does so here, by its own name
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    run()
        except Exception:
            self._pool = torch.cuda.graph_pool_handle()  # into the old one the allocator may record for ever
            raise
        finally:  # a trial that failed may have left work that writes where the next step does
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        replay: Replay = graph.replay
        return replay


def make_recorder(device: str) -> Recorder | None:
    """The recorder of a device; None where nothing can be recorded."""
    return CudaRecorder(torch.device(device)) if device.startswith("cuda") else None
