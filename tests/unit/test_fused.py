"""Modules made quick on a CPU give what transformers' own code gives, in every family; what is not known stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.causal import Causal
from tests.families import SERVED, VOCAB, save_model
from tests.parity.harness import AnswerFuzz, assert_same, generate, greedy, make_loop, run_all, submit
from verifier.cpu import fused
from verifier.cpu.fused import quicken, release, widen
from verifier.cpu.products import has_products
from verifier.load import load_backend
from verifier.model import load_network
from verifier.options import VerifierOptions

pytestmark = pytest.mark.skipif(not has_products(), reason="no compiled products on this machine")


def logits_of(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    places = torch.arange(ids.shape[0])
    with torch.inference_mode():
        found: torch.Tensor = network(
            input_ids=ids[None], position_ids=places[None], use_cache=False, step=Causal()
        ).logits[0]
    return found


def is_quick(module: torch.nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(SERVED))
def test_every_family_gives_the_same_numbers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = load_network(save_model(family, tmp_path), "", dtype, "cpu")
    ids = torch.arange(37) * 5 % VOCAB
    expected = logits_of(network, ids)
    quicken(network)
    found = logits_of(network, ids)
    linears = [module for module in network.modules() if type(module) is torch.nn.Linear]
    assert all(map(is_quick, linears))
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5 * float(expected.abs().max()))
    else:  # the same roundings, but for sums in another order
        apart = (found - expected).abs().float()
        assert apart.median() <= 2.0**-9 * expected.abs().float().mean()
        assert apart.max() <= 2.0**-4 * expected.abs().float().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2"])
def test_all_parts_of_a_family_are_known(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Code of ours that gave other numbers would be left out, and nothing but time would show it."""
    network = load_network(save_model(family, tmp_path), "", dtype, "cpu")
    quicken(network)
    left = {type(module).__name__ for module in network.modules() if not is_quick(module)}
    assert [name for name in left if name.endswith(("Linear", "RMSNorm", "MLP", "Attention"))] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whatever_the_others_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit."""
    network = load_network(save_model("llama", tmp_path), "", dtype, "cpu")
    quicken(network)
    layer = network.model.layers[0].mlp, network.model.norm
    for module in layer:
        x = torch.randn(1, 90, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.inference_mode():
            whole = module(x)
            for first, count in ((0, 1), (5, 4), (20, 60)):
                assert torch.equal(module(x[:, first : first + count]), whole[:, first : first + count])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_released_weights_are_not_needed(family: str, tmp_path: Path) -> None:
    network: Any = load_network(save_model(family, tmp_path), "", torch.float32, "cpu")
    quicken(network)
    ids = torch.arange(9)
    expected = logits_of(network, ids)
    before = sum(weight.nbytes for weight in network.parameters())
    release(network)
    assert torch.equal(logits_of(network, ids), expected)
    kept = {"Embedding", "GemmaTextScaledWordEmbedding", "LayerNorm", "GemmaRMSNorm", "LlamaRMSNorm"}
    left = sum(
        weight.nbytes
        for module in network.modules()
        for name, weight in module.named_parameters(recurse=False)
        if type(module).__name__ in kept or module is network.get_output_embeddings() or name == "bias"
    )
    assert sum(weight.nbytes for weight in network.parameters()) <= left < before
    assert network.get_output_embeddings().weight.shape[0] == VOCAB


def test_transformers_itself_is_not_changed(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    ids = torch.arange(9)
    before = logits_of(load_network(folder, "", torch.float32, "cpu"), ids)
    quicken(load_network(folder, "", torch.float32, "cpu"))
    other = load_network(folder, "", torch.float32, "cpu")
    assert not any(map(is_quick, other.modules()))
    assert torch.equal(logits_of(other, ids), before)


def test_code_that_gives_other_numbers_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_are_near", lambda one, other: False)
    network = load_network(save_model("llama", tmp_path), "", torch.float32, "cpu")
    quicken(network)
    assert {type(module).__name__ for module in network.modules() if is_quick(module)} == {"Linear"}


def test_without_products_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_products", lambda: False)
    network = load_network(save_model("llama", tmp_path), "", torch.float32, "cpu")
    quicken(network)
    assert not any(map(is_quick, network.modules()))


def test_types_without_code_of_ours_stay_with_torch(tmp_path: Path) -> None:
    network = load_network(save_model("llama", tmp_path), "", torch.float16, "cpu")
    quicken(network)
    assert not any(map(is_quick, network.modules()))


def test_mixed_traffic_comes_to_the_text_of_generate(tmp_path: Path) -> None:
    """Chunks, trees of any size, bare roots, preemption: every shape that a step may have."""
    folder = save_model("llama", tmp_path)
    verifier = load_backend(
        VerifierOptions(
            model=folder, device="cpu", threads=1, max_rows=4, max_positions=48, num_pages=33, page_size=8,
            is_compiled=True,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (1, 3, 70, 41, 20)]
    answers, gaps = generate(folder, prompts, 40)
    fuzz = AnswerFuzz(7, VOCAB, {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)})
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=48)
    drafters = ("fuzz", "fuzz", "none", "fuzz", "none")
    requests = [submit(f"r{i}", prompt, greedy(40), drafters[i]) for i, prompt in enumerate(prompts)]
    run = run_all(loop, requests, arrivals=[0, 0, 3, 5, 30])
    for index, answer in enumerate(answers):
        assert_same(run.answers[f"r{index}"], answer, gaps[index], f"r{index}")
    assert fuzz.num_accepted > 50


@pytest.mark.parametrize("shape", [(1, 49153), (3, 17), (70, 64), (0, 5)])
def test_logits_are_widened_as_torch_widens_them(shape: tuple[int, int]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    logits.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.bfloat16)[: logits.numel()]
    for given in (logits, logits[:, 1:], logits.float()):
        found = widen(given)
        assert found.dtype == torch.float32
        assert torch.equal(found.view(torch.int32), given.float().contiguous().view(torch.int32))
