"""The captured forward pass: bit-equal or not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.families import VOCAB, save_model
from verifier.model import AttentionInputs, Target, attention_modules, load_network
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot, Wanted
from verifier.probe import probe
from verifier.runner import Verifier
from verifier.torch.capture import MAX_POSITIONS, CapturedForward
from verifier.tree import DraftTrees


def run_tree(verifier: Verifier, size: int) -> torch.Tensor:
    """Prefill a prompt, verify a chain of `size` nodes; the candidates' logits tell the numbers of the pass."""
    trees = DraftTrees.allocate(1)
    sampling = SamplingParams(max_tokens=9, seed=0, temperature=0.0)
    start = RowStart(0, (5, 6, 7, 8), 4, sampling)
    pages = tuple((0, index, index + 1) for index in range(8))
    verifier.run(StepPlan(starts=(start,), pages=pages, chunks=(Chunk(0, 0, (5, 6, 7), False),)), trees)
    trees.append(list(range(8, 8 + size)), list(range(-1, size - 1)), [1.0] * size, [0] * size)
    verdict = verifier.run(StepPlan(trees=(TreeSlot(0, 3, size),)), trees, Wanted(4))
    assert verdict.candidate_logits is not None
    return torch.from_numpy(verdict.candidate_logits)


def test_captured_numbers_equal_eager_ones_for_any_size(tmp_path: Path) -> None:
    folder = save_model("gemma2", tmp_path)
    options = {"model": folder, "device": "cpu", "threads": 1, "max_rows": 1, "max_positions": 64, "page_size": 8}
    captured, eager = Verifier(VerifierOptions(**options)), Verifier(VerifierOptions(**options, is_eager=True))
    for size in (5, 1, 2, 17, 1, 40):
        assert torch.equal(run_tree(captured, size), run_tree(eager, size)), size


def test_recordings_of_two_models_do_not_mix(tmp_path: Path) -> None:
    verifiers = []
    for seed in (1, 2):
        folder = save_model("llama", tmp_path / str(seed), seed=seed)
        verifiers.append(Verifier(VerifierOptions(model=folder, device="cpu", threads=1, max_rows=1)))
    first = [run_tree(verifier, 3) for verifier in verifiers]
    assert not torch.equal(*first)
    assert torch.equal(run_tree(verifiers[0], 3), first[0])


def captured_llama(folder: str) -> CapturedForward:
    network = load_network(folder, "", torch.float32, "cpu")
    modules = attention_modules(network, [layer.name for layer in probe(folder).layers])
    return CapturedForward(Target(network), modules, VOCAB)


class Values:
    """Attention that hands the values through."""

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        fold = inputs.query.shape[1] // inputs.value.shape[1]
        return inputs.value.repeat_interleave(fold, dim=1).transpose(1, 2)


@torch.inference_mode()
@pytest.mark.parametrize("fault", ["raises", "changes numbers"])
def test_what_cannot_be_captured_runs_eagerly(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model("llama", tmp_path)
    tokens = torch.tensor([[5, 6, 7]])
    captured = captured_llama(folder)
    expected, _ = captured(tokens, tokens, Values())
    assert captured.recording(False, tokens.device) is not None

    def fake_compile(run: Callable[..., torch.Tensor], **options: object) -> object:
        def broken(*inputs: torch.Tensor) -> torch.Tensor:
            if fault == "raises":
                raise RuntimeError("cannot trace this\nat all")
            return run(*inputs) + 1e-6

        return broken

    monkeypatch.setattr(torch, "compile", fake_compile)
    again = captured_llama(folder)
    assert torch.equal(again(tokens, tokens, Values())[0], expected)
    assert again.recording(False, tokens.device) is None


class Branching(torch.nn.Module):
    """A model that does something else with more than eight positions."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 8)
        self.limit = limit

    def get_output_embeddings(self) -> None:
        """It has none."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        if input_ids.shape[1] > self.limit:
            hidden = hidden * 2
        return SimpleNamespace(logits=hidden)


@torch.inference_mode()
@pytest.mark.parametrize("limit", [2, 4, 8, 100])
def test_a_branch_on_the_number_of_positions_is_not_captured(limit: int) -> None:
    captured = CapturedForward(Target(Branching(limit)), [], VOCAB)
    assert captured.recording(False, torch.device("cpu")) is None
    tokens = torch.arange(2, 32)[None]
    assert torch.equal(
        captured(tokens, tokens, Values())[0][0], Branching.forward(captured._target.network, tokens).logits[0, 0]
    )


def test_large_steps_are_not_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = captured_llama(save_model("llama", tmp_path))
    tokens = torch.arange(MAX_POSITIONS + 1)[None] % VOCAB
    monkeypatch.setattr(captured, "recording", lambda *_: pytest.fail("asked for a recording"))
    with torch.inference_mode():
        assert captured(tokens, tokens % 16, Values())[0].shape == (MAX_POSITIONS + 1, VOCAB)
