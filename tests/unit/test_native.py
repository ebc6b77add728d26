"""The native attention in the types that models come in, and what happens where it cannot be compiled."""

from __future__ import annotations

import math
import shutil
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families import save_model
from tests.reference import ReferenceAttention
from tests.unit.test_attention import random_geometry, random_step
from verifier.attention import LayerKV
from verifier.cpu import build
from verifier.cpu.attention import NativeAttention
from verifier.cpu.build import NoLibrary, load_library
from verifier.kv import KVPool
from verifier.load import choose_attention, load_backend
from verifier.model import KV_ATTRIBUTE, AttentionInputs, ModelError
from verifier.options import VerifierOptions
from verifier.plan import StepPlan, TreeSlot
from verifier.probe import LayerGeometry
from verifier.step import StepBuffers
from verifier.tree import DraftTrees

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing has been compiled yet; its temporary directory."""
    load_library.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path  # type: ignore[misc]
    load_library.cache_clear()


def wide_geometry(rng: np.random.Generator) -> LayerGeometry:
    """Head sizes of real models, most of them no multiple of the vectors'; many query heads to a K/V head."""
    one = random_geometry(rng)
    k_dim, fold = int(rng.choice([48, 64, 80, 96, 100, 128])), int(rng.choice([1, 3, 7, 71]))
    return LayerGeometry(
        "layer", one.num_kv_heads * fold, one.num_kv_heads, k_dim, int(rng.choice([k_dim, 72])), k_dim**-0.5,
        one.window, one.softcap, one.has_sinks,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(12))
def test_any_type_and_size_equals_the_reference_in_float32(dtype: torch.dtype, seed: int) -> None:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    step, _ = random_step(rng, 16, 4 * 3100 // 16)
    geometry = wide_geometry(rng)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads, kv_heads, num = geometry.num_heads, geometry.num_kv_heads, step.num_positions
    # As a projection leaves them: heads within a position.
    query, key = (rand(1, num, count, geometry.k_dim).transpose(1, 2) for count in (heads, kv_heads))
    value, sinks = rand(1, kv_heads, num, geometry.v_dim), rand(heads) if geometry.has_sinks else None
    pools, results = [], []
    past = [rand(4 * 3100 // 16 * 16, kv_heads, dim) for dim in (geometry.k_dim, geometry.v_dim)]
    for attention, kind in ((ReferenceAttention(), torch.float32), (NativeAttention(), dtype)):
        pool = KVPool([geometry], 4 * 3100 // 16, 16, kind, "cpu")
        layer = torch.nn.Module()
        for mine, other in zip(pool.layer(0), past, strict=True):
            mine.copy_(other)
        setattr(layer, KV_ATTRIBUTE, LayerKV(*pool.layer(0), geometry))
        inputs = [tensor if tensor is None else tensor.to(kind) for tensor in (query, key, value, sinks)]
        results.append(attention.plan(step).attend(AttentionInputs(layer, *inputs[:3], None, None, None, inputs[3])))
        pools.append([tensor.float() for tensor in pool.layer(0)])
    unit = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(results[1].float(), results[0], atol=unit, rtol=max(unit, 1e-5))
    assert all(torch.equal(one, other) for one, other in zip(*pools, strict=True))


@needs_compiler
def test_a_number_that_is_none_spoils_its_row_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    step, num_rows = random_step(rng, 16, 800)
    assert num_rows > 1
    geometry = LayerGeometry("layer", 2, 1, 16, 16, 0.25, None, None, False)
    pool = KVPool([geometry], 800, 16, torch.float32, "cpu")
    layer = torch.nn.Module()
    setattr(layer, KV_ATTRIBUTE, LayerKV(*pool.layer(0), geometry))
    query, key, value = (torch.randn(1, count, step.num_positions, 16) for count in (2, 1, 1))
    key[0, 0, 0] = torch.nan
    out = NativeAttention().plan(step).attend(AttentionInputs(layer, query, key, value, None, None, None, None))
    assert out[0, : step.starts[1]].isnan().any()
    assert not out[0, step.starts[1] :].isnan().any()


@needs_compiler
def test_a_query_that_is_no_number_is_seen_beside_sinks() -> None:
    step, _ = random_step(np.random.default_rng(5), 16, 800)
    geometry = LayerGeometry("layer", 2, 1, 16, 16, 0.25, None, None, True)
    pool = KVPool([geometry], 800, 16, torch.float32, "cpu")
    layer = torch.nn.Module()
    setattr(layer, KV_ATTRIBUTE, LayerKV(*pool.layer(0), geometry))
    query, key, value = (torch.randn(1, count, step.num_positions, 16) for count in (2, 1, 1))
    query[0, 0, 1] = torch.nan
    planned = NativeAttention().plan(step)
    out = planned.attend(AttentionInputs(layer, query, key, value, None, None, None, torch.zeros(2)))
    assert out[0, 1, 0].isnan().all()
    assert not out[0, 0].isnan().any()
    with pytest.raises(AssertionError, match="was called with"):
        planned.attend(AttentionInputs(layer, query.bfloat16(), key, value, None, None, None, torch.zeros(2)))


def test_without_a_compiler_torch_attends(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_attention("auto", "cpu") == "sdpa"
    with pytest.raises(ModelError, match=r"attention native was asked for, but compiling native code needs g\+\+"):
        choose_attention("native", "cpu")


def test_native_is_for_a_cpu() -> None:
    with pytest.raises(ModelError, match="attention native runs on a CPU, not on cuda"):
        choose_attention("native", "cuda")


@needs_compiler
def test_what_does_not_compile_is_told_in_one_line(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken.cpp"
    broken.write_text("int main() { return nothing; }")
    monkeypatch.setattr(build, "_SOURCES", (broken,))
    with pytest.raises(NoLibrary, match=r"compiling native code failed: .*nothing"):
        load_library()
    assert not list(fresh.glob("foretoken-*/*")), "half a library must not stay"


@needs_compiler
def test_a_directory_that_others_can_write_to_is_not_used(fresh: Path) -> None:
    load_library()
    (folder,) = fresh.glob("foretoken-*")
    (built,) = folder.iterdir()
    written = built.stat().st_mtime_ns
    load_library.cache_clear()
    load_library()
    assert built.stat().st_mtime_ns == written, "compiled twice"
    folder.chmod(0o777)
    load_library.cache_clear()
    with pytest.raises(NoLibrary, match="not a directory of this user's alone"):
        load_library()


@needs_compiler
def test_a_verifier_on_a_cpu_takes_it(tmp_path: Path) -> None:
    verifier = load_backend(
        VerifierOptions(model=save_model("llama", tmp_path), device="cpu", max_rows=1, num_pages=40)
    )
    assert type(verifier._attention) is NativeAttention


@needs_compiler
@pytest.mark.parametrize(("one", "other", "mean"), [(0, 1, 0), (1, 2, 2), (2, 3, 2), (-1, -2, -2)])
def test_results_between_two_numbers_go_to_the_even_one(one: int, other: int, mean: int) -> None:
    """Two keys of equal weight, whose values are neighbours in bfloat16; counted in its units above 1 (below -1)."""
    buffers = StepBuffers(1, 4, 16, 16, "cpu")
    buffers.write_pages(((0, 0, 1),))
    trees = DraftTrees.allocate(1)
    trees.append([5, 6], [-1, 0], [1.0, 0.5], [0, 1])
    step = buffers.pack(StepPlan(trees=(TreeSlot(0, 0, 2),)), trees)
    geometry = LayerGeometry("layer", 1, 1, 16, 16, 1.0, None, None, False)
    pool = KVPool([geometry], 2, 16, torch.bfloat16, "cpu")
    layer = torch.nn.Module()
    setattr(layer, KV_ATTRIBUTE, LayerKV(*pool.layer(0), geometry))
    values = [math.copysign(1.0 + abs(units) * 2.0**-7, units or 1) for units in (one, other, mean)]
    zeros = torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16)
    value = torch.tensor(values[:2], dtype=torch.bfloat16).view(1, 1, 2, 1).expand(1, 1, 2, 16)
    out = NativeAttention().plan(step).attend(AttentionInputs(layer, zeros, zeros, value, None, None, None, None))
    assert out[0, 1, 0].float().tolist() == [values[2]] * 16


def test_a_package_holds_every_source_that_is_built() -> None:
    """A wheel takes no file that is not named: without one of these an installed server would compute by torch."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["verifier.cpu"]
    for source in (*build._SOURCES, *build._HEADERS):
        assert any(fnmatch(source.name, pattern) for pattern in patterns), source.name
