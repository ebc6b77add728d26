"""The worker's end of the socket: nothing is lost, a slow reader only slows, a lost one ends it."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from server.messages import FromWorker, Refused, frame
from server.worker import channel as channel_module
from server.worker.channel import Channel, ChannelClosed
from verifier.ipc import FrameReader


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    theirs.close()
    channel.close()


def read_all(sock: socket.socket, count: int) -> list[FromWorker]:
    reader, bodies = FrameReader(), []
    while len(bodies) < count:
        bodies += reader.feed(sock.recv(4096))
    return [msgspec.msgpack.Decoder(FromWorker).decode(body) for body in bodies]


def test_receive_does_not_wait_unless_told(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    assert channel.receive(is_waiting=False) == []
    sent = frame("hello")
    theirs.sendall(sent[:3])
    assert channel.receive(is_waiting=False) == []
    threading.Timer(0.05, theirs.sendall, [sent[3:] + frame("again")]).start()
    assert channel.receive(is_waiting=True) == [msgspec.msgpack.encode("hello"), msgspec.msgpack.encode("again")]


def test_what_a_slow_reader_does_not_take_is_sent_later(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    messages = [Refused(f"{index} " + "x" * 10_000) for index in range(200)]
    for message in messages:
        channel.send(message)  # two megabytes: far more than the socket holds, and nobody reads
    found: list[FromWorker] = []
    reader = threading.Thread(target=lambda: found.extend(read_all(theirs, len(messages))))
    reader.start()
    theirs_request = threading.Timer(0.2, theirs.sendall, [frame("go on")])
    theirs_request.start()
    channel.receive(is_waiting=True)  # an idle worker goes on sending
    reader.join(5)
    theirs_request.join()
    assert found == messages


def test_steps_wait_for_a_reader_that_is_too_far_behind(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 100_000)
    channel, theirs = ends
    messages = [Refused(f"{index} " + "x" * 10_000) for index in range(200)]
    found: list[FromWorker] = []
    reader = threading.Thread(target=lambda: (time.sleep(0.1), found.extend(read_all(theirs, len(messages)))))
    reader.start()
    began = time.monotonic()
    for message in messages:
        channel.send(message)
    assert time.monotonic() - began > 0.05
    channel.close()
    reader.join(5)
    assert found == messages


@pytest.mark.parametrize("is_waiting", [True, False])
def test_a_closed_other_side_ends_the_channel(ends: tuple[Channel, socket.socket], is_waiting: bool) -> None:
    channel, theirs = ends
    theirs.close()
    with pytest.raises(ChannelClosed):
        channel.receive(is_waiting=is_waiting)
    with pytest.raises(ChannelClosed):
        channel.send(Refused("nobody hears this"))


def test_the_other_side_may_die_while_a_step_waits_for_it(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "MAX_UNSENT_BYTES", 1000)
    channel, theirs = ends
    threading.Timer(0.05, theirs.close).start()
    with pytest.raises(ChannelClosed):
        channel.send(Refused("x" * 10_000_000))


def test_descriptors_of_any_number_will_do() -> None:
    """A server with a thousand open connections gives a new worker a socket of a high number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = 1500
    if soft <= high:
        resource.setrlimit(resource.RLIMIT_NOFILE, (high + 1, hard))
    ours, theirs = socket.socketpair()
    os.dup2(ours.fileno(), high)
    ours.close()
    channel = Channel(socket.socket(fileno=high))
    threading.Timer(0.05, theirs.sendall, [frame(1)]).start()
    assert channel.receive(is_waiting=True) == [msgspec.msgpack.encode(1)]
    theirs.close()
    channel.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
