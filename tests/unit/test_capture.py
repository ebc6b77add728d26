"""The captured forward pass: bit-equal or not used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.families import save_model
from verifier.capture import CapturedForward
from verifier.model import Attender, attention_modules, load_network
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.probe import probe
from verifier.runner import Verifier, VerifierOptions
from verifier.tree import DraftTrees


def run_tree(verifier: Verifier, size: int) -> torch.Tensor:
    """Prefill a prompt, verify a chain of `size` nodes; the candidates' logits tell the numbers of the pass."""
    trees = DraftTrees.allocate(1)
    sampling = SamplingParams(max_tokens=9, seed=0, temperature=0.0)
    start = RowStart(0, (5, 6, 7, 8), 4, sampling)
    pages = tuple((0, index, index + 1) for index in range(8))
    verifier.run(StepPlan(starts=(start,), pages=pages, chunks=(Chunk(0, 0, (5, 6, 7), False),)), trees)
    trees.append(list(range(8, 8 + size)), list(range(-1, size - 1)), [1.0] * size, [0] * size)
    verdict = verifier.run(StepPlan(trees=(TreeSlot(0, 3, size),)), trees, 4)
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


class Zeros:
    def attend(self, inputs: object) -> torch.Tensor:
        query = inputs.query  # type: ignore[attr-defined]
        return torch.zeros(1, query.shape[2], query.shape[1], query.shape[3])


@pytest.mark.parametrize("fault", ["raises", "changes numbers"])
def test_what_cannot_be_captured_runs_eagerly(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model("llama", tmp_path)
    network = load_network(folder, "", torch.float32, "cpu")
    captured = CapturedForward(network, attention_modules(network, [layer.name for layer in probe(folder).layers]))
    planned: Attender = Zeros()
    tokens = torch.tensor([[5, 6, 7]])
    expected = captured(tokens, tokens, planned)

    def fake_compile(run: object, **options: object) -> object:
        def broken(*inputs: torch.Tensor) -> torch.Tensor:
            if fault == "raises":
                raise RuntimeError("cannot trace this\nat all")
            return expected + 1e-6

        return broken

    again = CapturedForward(network, attention_modules(network, [layer.name for layer in probe(folder).layers]))
    monkeypatch.setattr(torch, "compile", fake_compile)
    assert torch.equal(again(tokens, tokens, planned), expected)
    assert torch.equal(again(tokens, tokens, planned), expected)
