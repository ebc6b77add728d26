"""A section of the GPU check: tokens a second of transformers' `generate` and of the verifier, one beside the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers

from tests.bench.device_model import SHAPES, build, make_config
from tests.bench.gpu_room import Room, first_line
from tests.bench.gpu_steps import CONTEXT, TINY_CONTEXT, Stand, free

NUM_TOKENS, TINY_TOKENS = 128, 3
_REPEATS = 3

Arm = Callable[[], float]
"""Decodes, and returns the seconds between one token and the next."""


class Stopwatch:
    """A streamer that says nothing: it notes when each token came. Owns the times."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        value.tolist()  # it may still be on its way from the device
        self.times.append(time.perf_counter())

    def end(self) -> None: ...

    @property
    def per_token(self) -> float:
        """Seconds between one token and the next, the median: what is compiled or recorded on the way is left out."""
        times = self.times[1:]  # the prompt comes first
        return statistics.median(after - before for before, after in pairwise(times))


def time_generate(room: Room) -> None:
    """Decoding one row behind a prompt, for each shape: the verifier as it starts by itself, and `generate`."""
    for shape in SHAPES[:1] if room.is_tiny else SHAPES:
        if room.is_over:
            room.add("left_out", shape)
            continue
        try:
            _time_shape(shape, room)
        except Exception as error:
            room.add("errors", f"{shape}: {first_line(error)}")
        free(room)


def _time_shape(shape: str, room: Room) -> None:
    count = TINY_TOKENS if room.is_tiny else NUM_TOKENS
    stand = Stand(shape, "default", room, 1)
    model = build(
        make_config(shape, room.is_tiny), "sdpa", torch.float32 if room.is_tiny else torch.bfloat16, room.device
    )
    arms: dict[str, Arm] = {
        "verifier": lambda: stand.decode(count) / count,
        "generate": lambda: generate(model, count, room, is_static=False),
    }
    _take_turns(shape, arms, room)
    if room.is_over:
        room.add("left_out", f"{shape} static compiled")
        return
    arms["generate static compiled"] = lambda: generate(model, count, room, is_static=True)
    _take_turns(shape, arms, room)


def _take_turns(shape: str, arms: dict[str, Arm], room: Room) -> None:
    """One run of each arm that is not counted, then the repeats; what an earlier call found is replaced."""
    first = {name: round(_timed(arm), 2) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(1 if room.is_tiny else _REPEATS):
        for name, arm in arms.items():
            seconds[name].append(arm())
    by_shape: dict[str, Any] = room.found.setdefault("tokens_per_s", {})
    by_shape[shape] = {name: round(1 / statistics.median(times), 1) for name, times in seconds.items()}
    room.found.setdefault("first_run_s", {})[shape] = first
    room.save()


def _timed(arm: Arm) -> float:
    began = time.perf_counter()
    arm()
    return time.perf_counter() - began


def generate(model: Any, count: int, room: Room, is_static: bool) -> float:
    """Seconds a token. With a static cache generate compiles the model by itself, but on a CPU."""
    transformers.logging.set_verbosity_error()
    context = TINY_CONTEXT if room.is_tiny else CONTEXT
    prompt = np.random.default_rng(2).integers(4, model.config.vocab_size, (1, context))
    ids = torch.from_numpy(prompt).to(room.device)
    watch = Stopwatch()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count + 1,
        do_sample=False,
        pad_token_id=0,
        streamer=watch,
        **({"cache_implementation": "static", "disable_compile": room.is_tiny} if is_static else {}),
    )
    assert len(watch.times) == count + 2, f"{len(watch.times) - 1} tokens instead of {count + 1}"
    return watch.per_token
