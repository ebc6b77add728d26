"""A decoder layer in one call gives the numbers of its own code to the bit, in every family that has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import SERVED, save_model
from verifier.cpu import backend as cpu_backend
from verifier.cpu import decoder
from verifier.cpu.backend import CpuBackend
from verifier.cpu.products import has_products
from verifier.cpu.threads import team_size
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import Chunk, StepPlan, TreeSlot
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


def save(family: str, folder: Path, **changes: Any) -> Path:
    """A model whose norms and biases are random too: of ones and zeros mistakes would not show."""
    file = Path(save_model(family, folder, **changes)) / "model.safetensors"
    stream = torch.Generator().manual_seed(5)
    weights = load_file(file)
    for name, weight in weights.items():
        if weight.dim() == 1:
            weights[name] = torch.randn(weight.shape, generator=stream) * 0.3 + name.endswith("norm.weight")
    save_file(weights, file, {"format": "pt"})
    return folder


def scores(backend: CpuBackend, num_positions: int) -> torch.Tensor:
    """States behind all layers, of all positions of a chunk, and of a tree behind it."""
    tokens = tuple(place * 7 % 97 for place in range(num_positions))
    pages = tuple((0, index, index + 1) for index in range(-(-(num_positions + 4) // backend.geometry.page_size)))
    backend._buffers.write_pages(pages)
    trees, found = DraftTrees.allocate(2), []
    trees.append([5, 6, 7, 8], [-1, 0, 0, 2], [1.0] * 4, [0] * 4)
    chunk = StepPlan(chunks=(Chunk(0, 0, tokens, True),))
    for plan, drafts in ((chunk, DraftTrees.allocate(2)), (StepPlan(trees=(TreeSlot(0, num_positions, 4),)), trees)):
        step = backend._buffers.pack(plan, drafts, num_positions)
        with torch.inference_mode():
            _, states = backend._forward(step, backend._attention.plan(step))
        assert states is not None
        found.append(states)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in JOINED), ("qwen3", {"head_dim": 12}), ("llama", {"attention_bias": True})],
)
def test_one_call_is_thirty_to_the_bit(
    family: str, changes: dict[str, Any], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(family, tmp_path, **changes)
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
    tried = decoder._Layer.attempt
    monkeypatch.setattr(decoder._Layer, "attempt", lambda *args, **named: tried(*args, **named) * (1 + 2**-20))
    assert num_joined(load(Path(save_model("llama", tmp_path)), "float32")) == 0


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_layer_that_is_packed_keeps_its_own_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some quantisations do it: no weight, buffers in its place. Torch multiplies then, on all threads."""

    class Packed(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.bias = linear.in_features, None
            self.register_buffer("packed", linear.weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.packed)  # type: ignore[arg-type]

    loaded = cpu_backend.quicken

    def pack(network: torch.nn.Module) -> Any:
        first = network.get_submodule("model.layers.0." + name)
        network.set_submodule("model.layers.0." + name, Packed(first))  # type: ignore[arg-type]
        return loaded(network)

    monkeypatch.setattr(cpu_backend, "quicken", pack)
    backend = load(Path(save_model("llama", tmp_path)), "float32")
    assert num_joined(backend) == 3
    assert not backend.is_row_invariant
    assert torch.get_num_threads() == 2


def test_torch_keeps_one_thread_where_all_is_ours(tmp_path: Path) -> None:
    """Its others would wait awake on the cores that ours compute on."""
    load(Path(save_model("llama", tmp_path)), "float32")
    assert (torch.get_num_threads(), team_size()) == (1, 2)
    load(Path(save_model("mixtral", tmp_path / "experts")), "float32")
    assert (torch.get_num_threads(), team_size()) == (2, 2)
