"""What every section of the GPU check works with: where, for how long, and what it has found; and how time is taken."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

COPY_BYTES = 2**31


@dataclass
class Room:
    """One section's place, time and findings. Owns the findings, and writes them where they are asked for."""

    device: str
    is_tiny: bool
    """Shapes for a CPU: the logic is run, the numbers mean nothing."""
    deadline: float
    """On time.monotonic()."""
    path: Path | None = None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0

    def list(self, name: str) -> list[Any]:
        """A list among the findings."""
        entries: list[Any] = self.found.setdefault(name, [])
        return entries

    def add(self, name: str, entry: Any) -> None:
        """Append to a list among the findings, and write them down: what comes next may end the process."""
        self.list(name).append(entry)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.found))
            part.replace(self.path)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def kernel_seconds(work: Callable[[], None], room: Room, repeats: int) -> list[float]:
    """Seconds that the device takes for `work`, without the host's part: a graph of it, replayed between two events.

    `work` launches kernels on the current stream and waits for nothing. On a CPU: plain calls.
    """
    work()
    if room.device != "cuda":
        return [_host_seconds(work) for _ in range(repeats)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return [event_seconds(graph.replay) for _ in range(repeats)]


def event_seconds(work: Callable[[], None]) -> float:
    """Seconds between two events around `work` on the device."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _host_seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy_bandwidth(room: Room) -> float:
    """Bytes read and written in a second by a copy of one large tensor into another."""
    size = 2**24 if room.is_tiny else COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=room.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copy()
    seconds = [event_seconds(copy) if room.device == "cuda" else _host_seconds(copy) for _ in range(10)]
    return 2 * size / statistics.median(seconds)
