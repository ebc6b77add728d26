"""Layers compiled one by one: one graph for all that are alike, the pool and no copy of it, the same numbers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from tests.devices import require_kernels
from tests.families import VOCAB, save_model
from tests.parity.harness import AnswerFuzz, assert_same, generate, greedy, make_loop, run_all, submit
from verifier.backend import Backend
from verifier.cuda.layers import CompiledLayers
from verifier.load import load_backend
from verifier.options import VerifierOptions

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What other tests have compiled counts against the limit of this process."""
    require_kernels("cpu")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_verifier(folder: str) -> Backend:
    numbers: dict[str, Any] = {"max_rows": 4, "max_positions": 64, "page_size": 4, "max_model_len": 64, "num_pages": 60}
    options = VerifierOptions(model=folder, device="cpu", attention="triton", threads=1, is_compiled=True, **numbers)
    return load_backend(options)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message
        for record in caplog.records
        if record.name.startswith("verifier") and record.levelno >= logging.WARNING
    ]


@needs_compiler
def test_one_graph_serves_all_layers_and_says_what_generate_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph that was given a copy of the pool would not find its layer: see CompiledLayers."""
    monkeypatch.setattr("verifier.cuda.layers._CHECKED", (17, 2))
    folder = save_model("llama", tmp_path, num_hidden_layers=3)
    verifier = make_verifier(folder)
    assert verifier.is_compiled
    assert counters["stats"]["unique_graphs"] == 1, "for three layers and any number of positions"
    prompts = [list(range(3, 10)), [5, 6]]
    answers, gaps = generate(folder, prompts, 6)
    fuzz = AnswerFuzz(0, VOCAB, {tuple(prompt): answers[index] for index, prompt in enumerate(prompts)})
    loop = make_loop(verifier, {"fuzz": fuzz})
    run = run_all(loop, [submit(str(index), prompt, greedy(6), nodes=5) for index, prompt in enumerate(prompts)])
    for index in range(2):
        assert_same(run.answers[str(index)], answers[index], gaps[index], str(index))
    assert not warned(caplog), "it was compiled and went on so"

    # What is wanted once more and may not be compiled any more runs as it is.
    def refuse(*_: object, **__: object) -> None:
        raise FailOnRecompileLimitHit("recompile_limit reached")

    for layer in verifier._layers._layers:
        layer._compiled_call_impl = refuse
    with caplog.at_level(logging.WARNING):
        again = run_all(make_loop(verifier, {}), [submit("0", prompts[0], greedy(6), "none")])
    assert again.answers["0"] == run.answers["0"]
    assert warned(caplog) == ["the layers run as they are from now on: recompile_limit reached"]


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_layers_that_cannot_be_compiled_run_as_they_are(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: torch.nn.Module, **_: object) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("no compiler\nfound")
            return 1.5 * self._call_impl(*args, **kwargs)

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    folder = save_model("llama", tmp_path, num_hidden_layers=2)
    with caplog.at_level(logging.WARNING):
        verifier = make_verifier(folder)
    assert not verifier.is_compiled
    (told,) = warned(caplog)
    assert {"raises": "no compiler found", "differs": "times the tolerance"}[fault] in told
    answers, gaps = generate(folder, [[5, 6, 7]], 3)
    run = run_all(make_loop(verifier, {}), [submit("0", [5, 6, 7], greedy(3), "none")])
    assert_same(run.answers["0"], answers[0], gaps[0], "0")


def test_a_network_without_a_list_of_layers_is_not_compiled(tmp_path: Path) -> None:
    from verifier.cuda.layers import CompileError
    from verifier.model import Target

    network = torch.nn.ModuleDict({"attention": torch.nn.Linear(2, 2)})
    network.get_output_embeddings = lambda: None  # type: ignore[assignment, operator]
    with pytest.raises(CompileError, match="attention is not in a list of layers"):
        CompiledLayers(Target(network), ["attention"], VOCAB)
