"""Entry of the ranks beside rank 0: `python -m verifier.parallel.main FD STORE`, started by ranks.py alone.

FD is an inherited stream socket to rank 0, STORE the descriptor of the file in which the ranks find each other. A rank
loads its part of the model, runs the passes and K/V moves that it is told of, and ends with rank 0. It samples nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading

from verifier.load import choose_attention, examine, load_part, make_attention, take_device
from verifier.model import ModelError, OutOfMemory
from verifier.options import VerifierOptions
from verifier.parallel.backend import RankBackend
from verifier.parallel.ranks import Place
from verifier.parallel.wire import Closed, Kind, Told, Wire, decode_arrays
from verifier.parent import die_with_parent


class Seat:
    """A rank's end of the wire to rank 0."""

    def __init__(self, wire: Wire, place: Place) -> None:
        self._wire = wire
        self.place = place

    def meet(self, number: int = 0) -> int:
        """Wait for all ranks; returns the least of their numbers. Raises: Closed."""
        self._wire.send(Kind.NUMBER, json.dumps(number).encode())
        kind, body = self._wire.receive()
        assert kind == Kind.NUMBER, kind
        least: int = json.loads(body)
        return least

    def begin(self) -> None:
        """All ranks have loaded."""
        self.meet()


def load(wire: Wire, store: int) -> RankBackend | None:
    """This rank, as rank 0 wants it; None after rank 0 was told why that cannot be. Raises: Closed."""
    kind, body = wire.receive()
    assert kind == Kind.OPTIONS, kind
    told = json.loads(body)
    options = VerifierOptions(**told["options"])
    place = Place(told["rank"], options.tensor_parallel_size, store, options.rank_timeout_s)
    try:
        device, seat = take_device(options), Seat(wire, place)
        attention = make_attention(choose_attention(options.attention, device))
        rank = RankBackend(load_part(options, examine(options), device, seat), attention)
        seat.begin()
        return rank
    except Closed:
        raise
    except Exception as error:  # whatever it is, rank 0 tells it in one line
        line = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}".splitlines()[0]
        reason = {"reason": line, "is_memory": isinstance(error, OutOfMemory)}
        wire.send(Kind.ERROR, json.dumps(reason).encode())
        return None


def follow(wire: Wire, rank: RankBackend) -> None:
    """Do what rank 0 tells. Raises: Closed when rank 0 is gone; whatever breaks a pass."""
    while True:
        kind, body = wire.receive()
        if kind == Kind.STEP:
            rank.follow(Told.decode(body))
        elif kind == Kind.MOVE:
            sources, targets = decode_arrays(body)
            rank.follow_move(sources, targets)
        else:
            assert kind == Kind.WEIGHTS, kind
            with contextlib.suppress(ModelError):  # rank 0 tells it
                rank.shared_weights  # noqa: B018


def _end_with(wire: Wire) -> None:
    """End this process when rank 0 hangs up, whatever it does at that time."""
    poll = select.poll()
    poll.register(wire.socket, 0)  # hang-ups alone
    poll.poll()
    os._exit(0)


def main(argv: list[str]) -> int:
    """Run a rank; returns the exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for rank 0
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    wire = Wire(socket.socket(fileno=int(argv[0])))
    threading.Thread(target=_end_with, args=(wire,), name="watch rank 0", daemon=True).start()
    try:
        rank = load(wire, int(argv[1]))
        if rank is None:
            return 1
        follow(wire, rank)
    except Closed:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
