"""The GPU's back end as it is, with a tiny model, on a device that is not there: recordings and steps of all kinds.

The network computes on the host's memory, the kernels do nothing, and a recording is its own callable. What comes out
says nothing; that it comes out, with no tensor of the host among those of the device, is what is looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.bench.mock_cuda import MockDriver, MockTensor
from tests.families import save_model
from verifier.backend import Backend
from verifier.cuda.recorder import Replay
from verifier.load import load_backend
from verifier.model import load_network
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.tree import DraftTrees

_PROMPT = (1, 2, 3, 4, 5)
_PAGES = 8
"""Of a row."""
_KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 3, "top_p": 0.5},
    {"logit_bias": ((3, 1.0),)},
    {"min_tokens": 3, "stop_ids": (1,)},
    {"num_logprobs": 2},
    {"presence_penalty": 0.5, "top_k": 3, "num_logprobs": 0},
    {"frequency_penalty": 0.5, "top_p": 0.5},
)
_FIRST = ([0, 1, 2, 3, 4, 5, 6], [3], [6])
_LATER = ([7], [0, 1], [6, 7], [2, 5, 6], list(range(len(_KINDS))))
"""Rows of later steps, for which nothing more may be compiled."""


class _NoRecorder:
    """Runs again what it should have recorded."""

    has_room = True

    def record(self, run: Replay) -> Replay:
        run()
        return run


def load() -> Backend:
    """A Llama of two layers; needs `mock_cuda` and MockMemory."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_model("llama", Path(folder), num_hidden_layers=2)
        network = load_network(model, "", torch.bfloat16, "cpu")
        for module in network.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                moved = weight.detach().as_subclass(MockTensor)
                setattr(module, name, torch.nn.Parameter(moved, requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.as_subclass(MockTensor))
        sizes: dict[str, Any] = {
            "max_rows": len(_KINDS),
            "max_positions": 256,
            "page_size": 16,
            "max_model_len": 16 * _PAGES,
        }
        options = VerifierOptions(
            model=model,
            device="cuda",
            attention="triton",
            is_compiled=False,
            num_pages=_PAGES * len(_KINDS) + 1,
            **sizes,
        )
        return load_backend(options, _NoRecorder(), network)


def serve(driver: MockDriver) -> Iterator[str]:
    """Record all there is to record, then run steps; a line of each part. Raises: AssertionError, whatever is wrong."""
    backend = load()
    backend.prepare_first()
    while backend.warm(is_idle=True):
        pass
    yield _told(driver, f"{backend.num_recorded} recordings")
    rows = range(len(_KINDS))
    starts = (
        RowStart(row, _PROMPT, len(_PROMPT), SamplingParams(max_tokens=20, seed=row, **_KINDS[row])) for row in rows
    )
    pages = tuple((row, index, 1 + row * _PAGES + index) for row in rows for index in range(_PAGES))
    chunks = tuple(Chunk(row, 0, _PROMPT, True) for row in rows)
    backend.run(StepPlan(starts=tuple(starts), pages=pages, chunks=chunks), DraftTrees.allocate(0))
    for name, batches in (("first steps", _FIRST), ("later steps", _LATER)):
        num_binaries = len(driver.binaries)
        for batch in batches:
            for num_nodes in (1, 6, 30):
                _step(backend, batch, num_nodes)
        num_new = len(driver.binaries) - num_binaries
        assert name == "first steps" or not num_new, f"{num_new} more kernels for later steps"
        yield _told(driver, name)


def _step(backend: Backend, rows: Sequence[int], num_nodes: int) -> None:
    """Trees for some rows, once with everything that may be wanted beside tokens."""
    slots = tuple(TreeSlot(row, len(_PROMPT), num_nodes) for row in rows)
    for wanted in (Wanted(), Wanted(num_candidates=4, hidden_tail=8)):
        trees = DraftTrees.allocate(len(rows))
        for _ in rows:
            nodes = list(range(num_nodes))
            trees.append(nodes, [-1, *((node - 1) // 2 for node in nodes[1:])], [1.0] * num_nodes, [0] * num_nodes)
        verdict = backend.run(StepPlan(trees=slots), trees, wanted)
        assert not verdict.failed, f"rows {verdict.failed} failed"
        assert verdict.rows.tolist() == list(rows)


def _told(driver: MockDriver, name: str) -> str:
    return f"{'back end':28} {name:24} {len(driver.launches)} launches and {len(driver.binaries)} kernels so far"
