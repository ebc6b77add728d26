"""What crosses the process boundary comes out as it went in, however the stream is cut."""

from __future__ import annotations

import random

import msgspec
import pytest

from server.config import Settings
from server.messages import (
    Abort,
    Busy,
    Delta,
    FromWorker,
    Outcome,
    Ping,
    Pong,
    Ready,
    Refused,
    RequestError,
    Shutdown,
    Speculation,
    SpeculationRecord,
    Submit,
    TokenLogprob,
    TopLogprob,
    ToWorker,
    frame,
)
from verifier.ipc import MAX_FRAME_BYTES, FrameReader
from verifier.plan import SamplingParams

TO_WORKER = [
    Submit(
        "r1",
        (1, 2, 3),
        SamplingParams(max_tokens=5, seed=2**64 - 1, temperature=0.7, logit_bias=((3, -1.5),), stop_ids=(4, 5)),
        Speculation("trigram", 16),
        "tenant",
        (7,),
    ),
    Abort("r1"),
    Shutdown(),
    Ping(),
]
FROM_WORKER = [
    Ready(100, 200, ("none", "trigram"), "cpu", "float32"),
    Refused("one line"),
    Pong(),
    Busy(600),
    Outcome(
        (
            Delta("r1", (1,), (TokenLogprob(-0.5, (TopLogprob(1, -0.5), TopLogprob(2, float("-inf")))),)),
            Delta("r2", (1, 2), None, "stop", 2, 0, SpeculationRecord(2, 30, 3, (1, 0, 0, 1))),
        ),
        (RequestError("r3", "why"),),
        None,
    ),
]


@pytest.mark.parametrize("message", TO_WORKER)
def test_messages_to_the_worker_round_trip(message: ToWorker) -> None:
    body = FrameReader().feed(frame(message))
    assert [msgspec.msgpack.Decoder(ToWorker).decode(one) for one in body] == [message]


@pytest.mark.parametrize("message", FROM_WORKER)
def test_messages_from_the_worker_round_trip(message: FromWorker) -> None:
    body = FrameReader().feed(frame(message))
    assert [msgspec.msgpack.Decoder(FromWorker).decode(one) for one in body] == [message]


def test_settings_travel_as_a_map() -> None:
    settings = Settings(model="m", api_key=("a", "b"), kv_cache_gib=0.5)
    (body,) = FrameReader().feed(frame(settings))
    assert isinstance(msgspec.msgpack.decode(body), dict)
    assert msgspec.msgpack.Decoder(Settings).decode(body) == settings


def test_frames_survive_any_cut() -> None:
    rng = random.Random(0)
    bodies = [msgspec.msgpack.encode("x" * rng.choice([0, 1, 300, 70_000])) for _ in range(20)]
    stream = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    reader, found = FrameReader(), []
    while stream:
        count = rng.choice([1, 2, 3, 5, 1000, 100_000])
        found += reader.feed(stream[:count])
        stream = stream[count:]
    assert found == bodies


def test_a_senseless_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="frame"):
        FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
