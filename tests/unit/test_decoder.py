"""A decoder layer in one call gives the numbers of its own code to the bit, in every family that has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import SERVED, save_model
from verifier.cpu import backend as cpu_backend
from verifier.cpu import decoder
from verifier.cpu.backend import CpuBackend
from verifier.cpu.products import has_products
from verifier.cpu.threads import team_size
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import Chunk, StepPlan
from verifier.tree import DraftTrees

pytestmark = pytest.mark.skipif(not has_products(), reason="no compiled products on this machine")

JOINED = ("llama", "mistral", "qwen2", "qwen3")


def load(folder: Path, dtype: str) -> CpuBackend:
    found = load_backend(
        VerifierOptions(
            model=str(folder), dtype=dtype, device="cpu", threads=2, max_rows=2, max_model_len=200, is_compiled=True
        )
    )
    assert isinstance(found, CpuBackend)
    return found


def num_joined(backend: CpuBackend) -> int:
    return sum(isinstance(vars(module).get("forward"), decoder._Layer) for module in backend._network.modules())


def scores(backend: CpuBackend, num_positions: int) -> torch.Tensor:
    """States behind all layers, of all positions of a chunk."""
    tokens = tuple(place * 7 % 97 for place in range(num_positions))
    pages = tuple((0, index, index + 1) for index in range(-(-num_positions // backend.geometry.page_size)))
    plan = StepPlan(pages=pages, chunks=(Chunk(0, 0, tokens, True),))
    backend._buffers.write_pages(pages)
    step = backend._buffers.pack(plan, DraftTrees.allocate(2), num_positions)
    with torch.inference_mode():
        _, states = backend._forward(step, backend._attention.plan(step))
    assert states is not None
    return states


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", JOINED)
def test_one_call_is_thirty_to_the_bit(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(save_model(family, tmp_path))
    joined = load(folder, dtype)
    monkeypatch.setattr(cpu_backend, "join_layers", lambda *_: 0)
    apart = load(folder, dtype)
    assert (num_joined(joined), num_joined(apart)) == (4, 0)
    for size in (1, 7, 150):  # more than the rows whose gates are computed at a time, and than a window
        assert torch.equal(scores(joined, size), scores(apart, size)), size


def test_heads_are_normed(tmp_path: Path) -> None:
    backend = load(Path(save_model("qwen3", tmp_path)), "float32")
    before = scores(backend, 9)
    layer = backend._network.model.layers[1]  # type: ignore[union-attr,index]
    layer.forward._record.query.eps = 0.5  # type: ignore[union-attr]
    assert not torch.equal(scores(backend, 9), before)


@pytest.mark.parametrize("family", sorted(set(SERVED) - set(JOINED)))
def test_other_families_keep_their_own_code(family: str, tmp_path: Path) -> None:
    assert num_joined(load(Path(save_model(family, tmp_path)), "float32")) == 0


def test_a_call_that_gives_other_numbers_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = decoder._Layer.__call__
    monkeypatch.setattr(decoder._Layer, "__call__", lambda *args, **named: called(*args, **named) * (1 + 2**-20))
    assert num_joined(load(Path(save_model("llama", tmp_path)), "float32")) == 0


def test_torch_keeps_one_thread_where_all_is_ours(tmp_path: Path) -> None:
    """Its others would wait awake on the cores that ours compute on."""
    load(Path(save_model("llama", tmp_path)), "float32")
    assert (torch.get_num_threads(), team_size()) == (1, 2)
