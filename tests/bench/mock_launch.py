"""Runs what launches kernels against a CUDA device that is not there: inputs, attention, sampling, walk, moves.

The code is that of a served step, in the order of verifier.cuda.backend; the tensors are empty where a network would
have filled them. A step that has run must run again, over sequences of another length, with the same binaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

from tests.bench.compile_kernels import FEW, LAYERS
from tests.bench.mock_cuda import MockDriver
from verifier.accept import Choice, Walks
from verifier.attention import LayerKV
from verifier.cuda.accept import DRAWN, GREEDY, Judgement, judge, judge_lists
from verifier.cuda.attention import PlannedTriton, TritonAttention
from verifier.cuda.graphs import bucket_of
from verifier.cuda.inputs import StepInputs
from verifier.cuda.kernels.move import move
from verifier.cuda.sampling import choose_device
from verifier.kv import KVPool
from verifier.model import KV_ATTRIBUTE, AttentionInputs
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.rows import SamplingRows
from verifier.step import PackedStep, StepBuffers
from verifier.tree import DraftTrees

MAX_ROWS, PAGE_SIZE, MAX_MODEL_LEN = 64, 16, 4096
_DEVICE = torch.device("cuda", 0)
_CACHED = (40, 1111)
"""Tokens that rows hold before a step, and before the next one of its shape."""


@dataclass(frozen=True)
class Shape:
    """A step: so many trees of so many nodes, then one piece of a prompt."""

    num_trees: int
    num_nodes: int
    chunk: int = 0

    def __str__(self) -> str:
        trees = f"{self.num_trees} of {self.num_nodes}" if self.num_trees else ""
        return " + ".join(filter(None, [trees, f"a prompt's {self.chunk}" if self.chunk else ""]))


SHAPES = (
    Shape(1, 1),
    Shape(64, 1),
    Shape(1, 16),
    Shape(1, 64),
    Shape(8, 16),
    Shape(7, 64),
    Shape(0, 0, 2048),
    Shape(0, 0, 77),
    Shape(9, 5, 200),
)
FEW_SHAPES = (Shape(1, 16, 100),)
VOCABULARIES = (320, 49152, 50257, 128256, 151936, 262144)
FEW_VOCABULARIES = (320,)
_SAMPLING = (
    SamplingParams(max_tokens=9, seed=1, top_k=40, top_p=0.9, logit_bias=((3, 1.0),)),
    SamplingParams(max_tokens=9, seed=2, min_p=0.1, presence_penalty=0.5),
)


class Stage:
    """The parts of a back end on the device, for one kind of layer and one vocabulary. Owns their memory."""

    def __init__(self, geometry: LayerGeometry, vocab: int, dtype: torch.dtype) -> None:
        self._geometry, self._dtype = geometry, dtype
        self._buffers = StepBuffers(MAX_ROWS + 1, 2048, MAX_MODEL_LEN, PAGE_SIZE, "cpu")
        places = [(row, index) for row in range(MAX_ROWS + 1) for index in range(MAX_MODEL_LEN // PAGE_SIZE)]
        self._buffers.write_pages(tuple((row, index, 1 + (row + index) % 3) for row, index in places))
        self._rows = SamplingRows(MAX_ROWS + 1, vocab)
        self._pool = KVPool([geometry] * 2, 4, PAGE_SIZE, dtype, "cuda", move)
        self._inputs = StepInputs(_DEVICE)
        self._attention = TritonAttention()
        self._layer = torch.nn.Module()
        setattr(self._layer, KV_ATTRIBUTE, LayerKV(*self._pool.layer(1), geometry))
        for row in range(MAX_ROWS + 1):
            self._rows.start(RowStart(row, (0,), 1, _SAMPLING[row % len(_SAMPLING)]))

    def pack(self, shape: Shape, num_cached: int) -> tuple[PackedStep, Walks]:
        """A step whose trees fork at every node."""
        trees = DraftTrees.allocate(shape.num_trees)
        nodes = list(range(shape.num_nodes))
        for _ in range(shape.num_trees):
            trees.append(nodes, [-1, *((node - 1) // 2 for node in nodes[1:])], [1.0] * len(nodes), [0] * len(nodes))
        slots = tuple(TreeSlot(row, num_cached, len(nodes)) for row in range(shape.num_trees))
        row, tokens = shape.num_trees, (0,) * shape.chunk
        chunks = (Chunk(row, num_cached, tokens, True),) if shape.chunk else ()
        step = self._buffers.pack(StepPlan(trees=slots, chunks=chunks), trees)
        return step, Walks.make(trees, step, [chunk.row for chunk in chunks])

    def attend(self, shape: Shape, num_cached: int) -> None:
        """The attention of a layer in a step by itself, and in a recording that could serve it."""
        step, walks = self.pack(shape, num_cached)
        self._inputs.take(step, walks, self._rows)
        self._layer_of(self._attention.plan(step), step.num_positions)
        bucket = bucket_of(step.num_positions, step.rows.shape[0], step.num_logits)
        if bucket is not None:
            slots = self._inputs.of(bucket.size_class).arrays.write_slots[: bucket.num_positions]
            planned = self._attention.plan_nothing(bucket.size_class, self._buffers, slots)
            self._layer_of(planned, bucket.num_positions)

    def _layer_of(self, planned: PlannedTriton, num_positions: int) -> None:
        """One layer's attention: keys as a compiled layer leaves them, and as transformers does."""
        geometry = self._geometry
        for is_packed in (True, False):
            query = self._made(num_positions, geometry.num_heads, geometry.k_dim, is_packed)
            key = self._made(num_positions, geometry.num_kv_heads, geometry.k_dim, is_packed)
            value = self._made(num_positions, geometry.num_kv_heads, geometry.v_dim, is_packed)
            sinks = torch.empty(geometry.num_heads, dtype=self._dtype, device=_DEVICE) if geometry.has_sinks else None
            out = planned.attend(AttentionInputs(self._layer, query, key, value, None, None, None, sinks))
            assert out.shape == (1, num_positions, geometry.num_heads, geometry.v_dim), tuple(out.shape)

    def _made(self, num_positions: int, heads: int, dim: int, is_packed: bool) -> torch.Tensor:
        """[1, heads, N, dim], with positions before heads in memory if it is packed."""
        if is_packed:
            return torch.empty((1, num_positions, heads, dim), dtype=self._dtype, device=_DEVICE).transpose(1, 2)
        return torch.empty((1, heads, num_positions, dim), dtype=self._dtype, device=_DEVICE)

    def choose(self, shape: Shape, num_cached: int) -> None:
        """Tokens, walk and moves of a step: as recordings have them, with biases, and with penalties."""
        step, walks = self.pack(shape, num_cached)
        arrays = self._inputs.take(step, walks, self._rows)
        logits = torch.zeros((step.num_logits, self._rows.vocab_size), device=_DEVICE)
        for flags in (GREEDY, DRAWN):
            won = arrays.tokens.new_empty((walks.rows.shape[0], 2 * walks.max_depth + 2))
            judge(logits, arrays, flags, self._pool, Judgement(won, arrays.tokens.new_empty(step.num_logits)))
        if shape.num_trees > 1 and step.num_logits <= MAX_ROWS:  # these do change logits, in memory that is there
            judge_lists(logits, arrays, walks, self._rows, self._pool)
            roots = walks.starts[:2]
            choose_device(
                logits[roots.tolist()], self._rows, Choice(walks.rows[:2].tolist(), walks.positions[roots].tolist())
            )


def launch_all(driver: MockDriver, is_short: bool) -> Iterator[str]:
    """Run all, or few; a line of each. Raises: what Triton raises, AssertionError."""
    shapes, vocabularies = (FEW_SHAPES, FEW_VOCABULARIES) if is_short else (SHAPES, VOCABULARIES)
    layers = [(name, torch.bfloat16) for name in (FEW[:1] if is_short else LAYERS)]
    if not is_short:
        layers += [(FEW[0], torch.float16), (FEW[0], torch.float32)]
    for name, dtype in layers:
        stage = Stage(LAYERS[name], 320, dtype)
        for shape in shapes:
            yield _line(driver, f"attention {name} {str(dtype)[6:]}", shape, stage.attend)
    for vocab in vocabularies:
        stage = Stage(LAYERS[FEW[0]], vocab, torch.bfloat16)
        for shape in shapes:
            yield _line(driver, f"choice of {vocab}", shape, stage.choose)


def _line(driver: MockDriver, name: str, shape: Shape, run: Callable[[Shape, int], None]) -> str:
    """Run a step twice; the second time nothing may be compiled."""
    num_binaries, num_launches = len(driver.binaries), len(driver.launches)
    began = perf_counter()
    run(shape, _CACHED[0])
    compiled = driver.binaries[num_binaries:]
    launched = driver.launches[num_launches:]
    run(shape, _CACHED[1])
    again = len(driver.binaries) - num_binaries - len(compiled)
    assert not again, f"{name}, {shape}: {again} more kernels for other lengths"
    kinds, spilled = len({launch.name for launch in launched}), max((binary[1] for binary in compiled), default=0)
    counted = (
        f"{len(launched):4} launches of {kinds} kernels, {len(compiled):3} compiled, {spilled:4} bytes spilled at most"
    )
    return f"{name:28} {shape!s:24} {counted}, {perf_counter() - began:5.1f} s"
