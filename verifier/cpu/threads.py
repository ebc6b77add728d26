"""How many threads compute on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_FEW = 3
_size = 0


def use_threads(count: int) -> None:
    """Let our code compute on `count` threads from now on, and torch as well."""
    global _size
    _size = count
    torch.set_num_threads(count)


def leave_torch_one() -> None:
    """Let torch compute on one thread, where all decoder layers are computed by our code.

    After each call that torch shares out, its other threads wait awake for the next. In a step there is one, the sines
    and cosines of the positions, and our threads then lack the core: steps took a fifth longer.
    """
    torch.set_num_threads(1)


def team_size() -> int:
    """How many threads our code computes on."""
    return _size or torch.get_num_threads()


def num_compute_threads() -> int:
    """One for each core that this process may use; where there are more than a few, one stays for other processes.

    On two cores the second one wins more than the API process loses by it (docs/decisions.md). Two threads of one
    core share its arithmetic: they count once. A container's CPU quota is a bound, rounded up.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in allowed})
    usable = min(cores, _quota() or cores)
    has_spare = usable == cores < len(allowed)  # second threads of the cores
    return usable if usable <= _FEW or has_spare else usable - 1


def _siblings(cpu: int) -> str:
    """A name of the core that a CPU is part of."""
    path = _CPUS / f"cpu{cpu}/topology/thread_siblings_list"
    return path.read_text().strip() if path.exists() else str(cpu)


def _quota() -> int:
    """CPUs that the control group may use; 0 is no bound."""
    if not _QUOTA.exists():
        return 0
    quota, period = _QUOTA.read_text().split()
    return 0 if quota == "max" else max(1, -(-int(quota) // int(period)))
