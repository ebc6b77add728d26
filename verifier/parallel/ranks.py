"""Rank 0's side of a split model: it starts the other ranks, tells them each step, and notices when one is gone.

The other ranks are children of this process (main.py). Plans and K/V moves go to them over one socket pair
each; the parts of a pass meet in a process group, gloo on a CPU and NCCL on GPUs, which find each other through a file
without a name: no port, no folder, nothing to clean up. What a step wins is decided here alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
from torch import distributed

from verifier.model import ModelError, OutOfMemory
from verifier.options import VerifierOptions
from verifier.parallel.split import rank_layers, split_network, split_refusals
from verifier.parallel.wire import Closed, Kind, RankLost, Told, Wire, encode_arrays
from verifier.probe import ProbeReport
from verifier.tree import Int64

_COMMAND = (sys.executable, "-P", "-m", "verifier.parallel.main")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this is, and where it meets the others."""

    rank: int
    size: int
    store: int
    """Descriptor of the file in which the ranks find each other."""
    timeout_s: float
    """How long a rank waits for another one in the middle of a pass."""

    def join(self, device: str) -> None:
        """Make the process group. On GPUs, rank n takes GPU n."""
        # The ranks are on one machine: what gloo listens on must not be reachable from another.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        is_gpu = device == "cuda"
        if is_gpu:
            torch.cuda.set_device(self.rank)
        distributed.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=distributed.FileStore(f"/proc/self/fd/{self.store}", self.size),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.timeout_s),
            device_id=torch.device("cuda", self.rank) if is_gpu else None,
        )


class Seat(Protocol):
    """What a rank needs of its connection to the others while it loads."""

    @property
    def place(self) -> Place:
        """Which rank this is."""

    def meet(self, number: int = 0) -> int:
        """Wait for all ranks; returns the least of their numbers. Raises: what kept another rank from coming."""

    def begin(self) -> None:
        """All ranks have loaded; they wait for passes."""


def take_part(seat: Seat, network: torch.nn.Module, report: ProbeReport, device: str) -> ProbeReport:
    """Keep this rank's part of a loaded network, on `device`.

    Returns: the report, with the layers as this rank has them. Raises: ModelError, RankLost.
    """
    seat.meet()
    seat.place.join(device)
    split_network(network, seat.place.size, device)
    return replace(report, layers=rank_layers(network, report.layers, device))


def start_ranks(options: VerifierOptions, report: ProbeReport, device: str) -> Ranks:
    """The other ranks, loading. Raises: ModelError if the model cannot be split so."""
    size = options.tensor_parallel_size
    reasons = split_refusals(report, size)
    if device == "cuda" and torch.cuda.device_count() < size:
        reasons.append(f"tensor_parallel_size {size} needs as many GPUs, torch finds {torch.cuda.device_count()}")
    if not sys.platform.startswith("linux"):
        reasons.append(f"tensor_parallel_size {size} needs Linux")
    if reasons:
        raise ModelError(f"{options.model} cannot be split over {size} ranks: {'; '.join(reasons)}")
    return Ranks(options)


@dataclass(frozen=True, slots=True)
class _Other:
    """Another rank, seen from rank 0."""

    rank: int
    process: subprocess.Popen[bytes]
    wire: Wire


class Ranks:
    """The ranks 1, 2, ... of a model of which this process is rank 0.

    Owns their processes, the wires to them, the process group, the thread that watches them, and the page table writes
    that they were not told yet.
    """

    def __init__(self, options: VerifierOptions) -> None:
        store = os.memfd_create("foretoken-ranks")
        self.place = Place(0, options.tensor_parallel_size, store, options.rank_timeout_s)
        self._pages: list[tuple[int, int, int]] = []
        self._others: list[_Other] = []
        self._is_closing = False
        self._watch: threading.Thread | None = None
        for rank in range(1, self.place.size):
            self._others.append(self._start(rank, options))

    def _start(self, rank: int, options: VerifierOptions) -> _Other:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), self.place.store)
        with theirs:
            process = subprocess.Popen([*_COMMAND, *map(str, fds)], pass_fds=fds, env=_environment())
        wire = Wire(ours)
        wire.send(Kind.OPTIONS, json.dumps({"rank": rank, "options": asdict(options)}).encode())
        return _Other(rank, process, wire)

    def meet(self, number: int = 0) -> int:
        """Wait for all ranks; returns the least of their numbers. Raises: ModelError, RankLost."""
        for other in self._others:
            try:
                kind, body = other.wire.receive()
            except Closed as error:
                raise RankLost(f"rank {other.rank} ended while it loaded ({_end_of(other.process)})") from error
            said = json.loads(body)
            if kind == Kind.ERROR:
                kept = OutOfMemory if said["is_memory"] else ModelError
                raise kept(f"rank {other.rank}: {said['reason']}")
            number = min(number, said)
        self._tell(Kind.NUMBER, json.dumps(number).encode())
        return number

    def begin(self) -> None:
        """From here on a rank that ends takes this process with it: a pass that waits for it cannot be told to stop."""
        self.meet()
        for other in self._others:
            other.wire.socket.settimeout(self.place.timeout_s)
        self._watch = threading.Thread(target=self._wait_for_an_end, name="watch ranks", daemon=True)
        self._watch.start()

    def _wait_for_an_end(self) -> None:
        poll = select.poll()
        for other in self._others:
            poll.register(other.wire.socket, 0)  # hang-ups alone
        ended = {fd for fd, _ in poll.poll()}
        if self._is_closing:
            return
        for other in self._others:
            if other.wire.socket.fileno() in ended:
                logger.error("rank %d ended (%s), and with it this process", other.rank, _end_of(other.process))
        os._exit(1)

    def note_pages(self, pages: tuple[tuple[int, int, int], ...]) -> None:
        """Page table writes that the ranks must know before their next pass, even if this step comes to none."""
        self._pages += pages

    @contextlib.contextmanager
    def leading(self, told: Told) -> Iterator[None]:
        """Let the ranks run a pass while the body runs this rank's part. Raises: RankLost for all that goes wrong.

        Whatever kept one rank from the end of a pass, the others may wait in the middle of it.
        """
        plan = replace(told.plan, pages=tuple(self._pages))
        try:
            self._tell(Kind.STEP, replace(told, plan=plan).encode())
            self._pages.clear()
            yield
        except RankLost:
            raise
        except Exception as error:
            line = " ".join(str(error).split())
            raise RankLost(f"the ranks fell out of step: {type(error).__name__}: {line}") from error

    def move(self, sources: Int64, targets: Int64) -> None:
        """What was accepted lies at slots `sources` [m] and belongs to `targets` [m]. Raises: RankLost."""
        self._tell(Kind.MOVE, encode_arrays([sources, targets]))

    def show_weights(self) -> None:
        """Let the ranks give their parts of the embeddings. Raises: RankLost."""
        self._tell(Kind.WEIGHTS)

    def _tell(self, kind: Kind, body: bytes = b"") -> None:
        for other in self._others:
            try:
                other.wire.send(kind, body)
            except Closed as error:
                raise RankLost(f"rank {other.rank} does not listen: {error}") from error

    def close(self) -> None:
        """End the ranks and the process group; to be called once. A rank has nothing to save."""
        self._is_closing = True
        for other in self._others:
            other.process.kill()
        for other in self._others:
            other.process.wait()
        if self._watch is not None:
            self._watch.join()
        for other in self._others:
            other.wire.socket.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        os.close(self.place.store)


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """How a process that hung up ended, if it does so soon."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f"exit code {process.wait(1.0)}"
    return "still running"


def _environment() -> dict[str, str]:
    """Ours, with these packages importable wherever this process was started."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, root])}
