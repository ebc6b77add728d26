"""A section of the GPU check: whole steps of random-weight models, and the host's part in them."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

from tests.bench.device_model import SHAPES, build, make_config, step_bytes
from tests.bench.gpu_room import Room, copy_bandwidth, first_line
from verifier.load import load_backend
from verifier.model import ATTENTION_NAME, KV_ATTRIBUTE
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees
from verifier.verdict import Verdict

MODES: dict[str, dict[str, bool]] = {
    "compiled": {"is_compiled": True},
    "graphs": {"is_compiled": False},
    "eager": {"is_eager": True},
    "default": {},
}
"""What the verifier is told; unless it is eager it records its steps where the device can. In the order of the run."""
CELLS = {
    "compiled": ((1, 8, 32, 64), (1, 8, 64)),
    "graphs": ((1, 8, 32, 64), (1, 8, 64)),
    "eager": ((1, 32), (1, 8)),
}
"""Rows and nodes that are measured in each mode; those of one row come first."""
TINY_CELLS = {"graphs": ((1,), (1, 4)), "eager": ((1,), (1, 4))}
CONTEXT, TINY_CONTEXT = 1024, 24
_MOST_ROWS, _MOST_NODES = 64, 64


class Stand:
    """A verifier over random weights and random K/V, every row `context` tokens long. Owns it."""

    def __init__(self, shape: str, mode: str, room: Room, most_rows: int) -> None:
        self.room, self.context = room, TINY_CONTEXT if room.is_tiny else CONTEXT
        dtype = torch.float32 if room.is_tiny else torch.bfloat16
        config = make_config(shape, room.is_tiny)
        network = build(config, ATTENTION_NAME, dtype, room.device)
        self.weight_bytes = step_bytes(network)
        page_size, length = 16, -(-(self.context + _MOST_NODES + 256) // 256) * 256
        pages = -(-length // page_size)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            options = VerifierOptions(
                model=folder,
                dtype=str(dtype).removeprefix("torch."),
                device=room.device,
                attention="triton",
                threads=1,
                max_model_len=length,
                max_rows=most_rows,
                max_positions=max(most_rows * _MOST_NODES, self.context),
                page_size=page_size,
                num_pages=most_rows * pages + 1,
                **MODES[mode],
            )
            self.verifier = load_backend(options, network=network)
        heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        for module in network.modules():
            if hasattr(module, KV_ATTRIBUTE):
                layer = getattr(module, KV_ATTRIBUTE)
                layer.k.normal_()
                layer.v.normal_()
        self.token_bytes = 2 * config.num_hidden_layers * heads * dtype.itemsize
        """K/V of one token."""
        self._trees = DraftTrees.allocate(most_rows)
        self._vocab_size = config.vocab_size
        sampling = SamplingParams(max_tokens=length, seed=0, temperature=0.0)
        starts = tuple(RowStart(row, (1,), self.context, sampling) for row in range(most_rows))
        order = (np.random.default_rng(0).permutation(most_rows * pages) + 1).tolist()
        table = tuple((place // pages, place % pages, page) for place, page in enumerate(order))
        self._trees.clear()
        self._trees.append_root(3)
        self.verifier.run(StepPlan(starts=starts, pages=table, trees=(TreeSlot(0, 0, 1),)), self._trees)

    def prepare(self) -> None:
        """Have the step that has just run recorded, where steps of its size are and it is not yet."""
        graphs = getattr(self.verifier, "_graphs", None)
        if graphs is not None and graphs._missed:
            self.verifier.warm(is_idle=True)

    def floor_bytes(self, rows: int, nodes: int) -> int:
        """What a step reads at least."""
        return self.weight_bytes + rows * (self.context + nodes) * self.token_bytes

    def make_step(self, rows: int, nodes: int) -> Callable[[], Verdict]:
        """A step of `rows` trees of `nodes` nodes, of random form and tokens."""
        rng = np.random.default_rng(1)
        self._trees.clear()
        for _ in range(rows):
            parents = [-1] + [int(rng.integers(max(0, node - 4), node)) for node in range(1, nodes)]
            tokens = (rng.permutation(self._vocab_size - 4)[:nodes] + 4).tolist()
            self._trees.append(tokens, parents, [1.0] * nodes, [0] * nodes)
        plan = StepPlan(trees=tuple(TreeSlot(row, self.context, nodes) for row in range(rows)))
        return lambda: self.verifier.run(plan, self._trees)

    def decode(self, count: int) -> float:
        """Seconds for `count` tokens one after another in row 0, behind a prompt that is read first."""
        rng = np.random.default_rng(2)
        prompt = tuple(rng.integers(4, self._vocab_size, self.context).tolist())
        self._trees.clear()
        verdict = self.verifier.run(StepPlan(chunks=(Chunk(0, 0, prompt, True),)), self._trees)
        began = time.perf_counter()
        for place in range(count):
            self._trees.clear()
            self._trees.append_root(int(verdict.tokens[0, 0]))
            verdict = self.verifier.run(StepPlan(trees=(TreeSlot(0, self.context + place, 1),)), self._trees)
        seconds = time.perf_counter() - began
        self.prepare()
        return seconds


def free(room: Room) -> None:
    """Give back what a stand or a model held; the caller has let go of it."""
    torch._dynamo.reset()
    gc.collect()
    if room.device == "cuda":
        torch.cuda.empty_cache()


def time_steps(room: Room) -> None:
    """Every shape in every mode: first what the criteria ask for, then the rest while there is time."""
    bandwidth = copy_bandwidth(room)
    room.found["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    room.found["context"] = TINY_CONTEXT if room.is_tiny else CONTEXT
    for shape in SHAPES:
        for mode in TINY_CELLS if room.is_tiny else CELLS:
            try:
                _time_mode(room, shape, mode, bandwidth)
            except Exception as error:
                room.add("errors", f"{shape} {mode}: {first_line(error)}")
            free(room)


def _time_mode(room: Room, shape: str, mode: str, bandwidth: float) -> None:
    rows, nodes = (TINY_CELLS if room.is_tiny else CELLS)[mode]
    if room.is_over:
        room.add("left_out", f"{shape} {mode}")
        return
    began = time.monotonic()
    stand = Stand(shape, mode, room, max(rows))
    if mode == "compiled" and not stand.verifier.is_compiled:
        room.add("left_out", f"{shape} {mode}: not compiled on this device")
        return
    room.add("ready_s", {"shape": shape, "mode": mode, "s": round(time.monotonic() - began, 1)})
    for num_rows in rows:
        for num_nodes in nodes:
            cell: dict[str, Any] = {"shape": shape, "mode": mode, "rows": num_rows, "nodes": num_nodes}
            if room.is_over:
                room.add("left_out", f"{shape} {mode} rows {num_rows} nodes {num_nodes}")
                continue
            try:
                cell |= time_cell(stand, num_rows, num_nodes, bandwidth)
            except Exception as error:
                cell["error"] = first_line(error)
            room.add("cells", cell)


def time_cell(stand: Stand, rows: int, nodes: int, bandwidth: float) -> dict[str, Any]:
    """Median and minimum of a step from call to verdict, the floor, and the host gap."""
    step = stand.make_step(rows, nodes)
    began = time.perf_counter()
    verdict = step()
    stand.prepare()
    first_s = time.perf_counter() - began
    one = _seconds(step)
    times = [_seconds(step) for _ in range(1 if stand.room.is_tiny else int(min(40, max(8, 0.4 / one))))]
    median, floor = statistics.median(times), stand.floor_bytes(rows, nodes) / bandwidth
    cell: dict[str, Any] = {
        "ms": round(median * 1e3, 3),
        "min_ms": round(min(times) * 1e3, 3),
        "floor_ms": round(floor * 1e3, 3),
        "of_floor": round(median / floor, 3),
        "first_s": round(first_s, 2),
        "is_finite": not verdict.failed,
    }
    if rows == 1 and nodes < _MOST_NODES:
        device = device_seconds(step, stand.room, 1 if stand.room.is_tiny else 10)
        if device is not None:
            cell |= {"device_ms": round(device.span_s * 1e3, 3), "bubbles_ms": round(device.bubbles_s * 1e3, 3)}
            cell["gap_ms"] = round((median - device.span_s) * 1e3, 3)
    return cell


def _seconds(step: Callable[[], Verdict]) -> float:
    began = time.perf_counter()
    step()  # ends with the reading of what was won, so the device is done
    return time.perf_counter() - began


@dataclass(frozen=True)
class DeviceTime:
    """A step as the device sees it: from its first kernel or copy to the end of its last, and the idle time between."""

    span_s: float
    bubbles_s: float
    """Between two nodes of a graph the device idles for a moment, which is not the host's doing."""

    @classmethod
    def of(cls, spans: list[tuple[float, float]]) -> DeviceTime:
        """From when kernels and copies of one step ran, in microseconds."""
        span = max(stop for _, stop in spans) - min(start for start, _ in spans)
        return cls(span / 1e6, (span - union(spans)) / 1e6)


def device_seconds(step: Callable[[], Verdict], room: Room, count: int) -> DeviceTime | None:
    """The median of `count` steps, as the profiler sees their kernels and copies, also those of graphs.

    On a CPU the forward pass stands for it; None where the profiler may not look.
    """
    if room.device != "cuda":
        return DeviceTime(statistics.median(step().forward_s for _ in range(count)), 0.0)
    found = []
    for _ in range(count):  # a profile of its own for each: nothing else tells where one step ends
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        if spans:
            found.append(DeviceTime.of(spans))
    return sorted(found, key=lambda one: one.span_s)[len(found) // 2] if found else None


def union(spans: list[tuple[float, float]]) -> float:
    """Length of what any of the spans covers."""
    covered, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return covered
