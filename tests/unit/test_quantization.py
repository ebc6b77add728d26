"""What is refused of quantised checkpoints, and that a layer which mixes rows is found whatever it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.cli import main
from tests import quantised
from tests.families import make_config
from verifier import quantization
from verifier.load import load_backend
from verifier.model import ModelError
from verifier.options import VerifierOptions, choose_dtype
from verifier.probe import ProbeReport, probe, probe_config
from verifier.quantization import check_loaded, quantization_of
from verifier.weights import shared_weights


def reported(**told: Any) -> ProbeReport:
    config = make_config("llama")
    config.quantization_config = told
    return probe_config(config)


def test_a_plain_model_is_none() -> None:
    assert quantization_of(make_config("llama")) is None
    assert probe_config(make_config("llama")).quantization is None


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"quant_method": "torchao"}, "quantised by torchao, which needs packages: pip install torchao"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, which needs packages: pip install optimum gptqmodel"),
        ({"quant_method": "fp8"}, "quantised by fp8, which needs packages: pip install accelerate"),
        ({"load_in_4bit": True}, "by bitsandbytes, which needs packages: pip install bitsandbytes accelerate"),
    ],
)
def test_a_missing_package_is_named(told: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    (refusal,) = reported(**told).refusals
    assert line in refusal


def test_an_unknown_method_is_refused_not_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers itself would load the packed numbers as if they were weights."""
    config = make_config("llama").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "homemade"}}))
    assert main(["check-model", str(tmp_path)]) == 2
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 1
    assert "quantised by homemade" in refused[0]
    with pytest.raises(ModelError, match="homemade"):
        load_backend(VerifierOptions(model=str(tmp_path), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_what_needs_a_gpu_is_said_in_one_line() -> None:
    (line,) = reported(quant_method="fbgemm_fp8").refusals
    assert "GPU" in line
    assert "\n" not in line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            quantised.torchao("Int8DynamicActivationInt8WeightConfig", granularity=("PerTensor",)),
            r"torchao \(Int8DynamicActivationInt8WeightConfig\) with one scale for all rows",
        ),
        (quantised.bitsandbytes(load_in_8bit=True), "in 8 bits with llm_int8_threshold 6"),
        (quantised.compressed_tensors("tensor"), "with one dynamic scale for all rows"),
        (
            quantised.compressed_tensors(
                "token", kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
            ),
            "with a kv_cache_scheme",
        ),
    ],
)
def test_what_would_break_a_promise_is_refused(make: Callable[[Path], str], line: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=line) as caught:
        load_backend(VerifierOptions(model=make(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


class Linear(torch.nn.Linear):
    """Activations in 8 bits, by one scale for `rows` of them: all, or each its own."""

    is_mixing = True

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        peak = rows.abs().amax() if self.is_mixing else rows.abs().amax(-1, keepdim=True)
        return super().forward((rows / peak * 127).round() / 127 * peak)


class Network(torch.nn.Module):
    """Calls its attention once."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.said = layer, torch.nn.Linear(16, 10)

    def forward(self, input_ids: torch.Tensor, step: Any, **_: Any) -> None:
        states = self.layer(torch.ones(1, 1, input_ids.shape[1], 16, dtype=self.said.weight.dtype))
        step.attend(quantization.AttentionInputs(self, states, states, states, None, None, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_mixes_rows_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = Network(Linear(16, 16)).to(dtype)
    with pytest.raises(ModelError, match=r"rows of a step change each other in layer \(\d+%\)"):
        check_loaded(network, "some", dtype)
    monkeypatch.setattr(Linear, "is_mixing", False)
    check_loaded(network, "some", dtype)


def test_another_type_than_asked_for_is_named() -> None:
    with pytest.raises(ModelError, match="run in float32, not in float64: pass --dtype float32"):
        check_loaded(Network(torch.nn.Identity()), "some", torch.float64)


def test_weights_that_do_not_run_are_one_line() -> None:
    with pytest.raises(ModelError, match="quantised by some do not run in float32 here: mat1 and mat2") as caught:
        check_loaded(Network(torch.nn.Linear(3, 3)), "some", torch.float32)
    assert "\n" not in str(caught.value)


def test_the_type_is_what_the_checkpoint_was_stored_in(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is absent")
    report = probe(quantised.fp8(tmp_path))
    assert report.quantization is not None
    assert report.quantization.dtype == "float32"
    assert choose_dtype("auto", "cuda", report) == "float32"
    assert choose_dtype("bfloat16", "cpu", report) == "bfloat16"
    if not torch.cuda.is_available():
        assert report.notes == ("weights quantised by fp8 are unpacked while they are loaded",)


@pytest.mark.filterwarnings("ignore")
def test_check_model_tells_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quantised.torchao("Int8WeightOnlyConfig")(tmp_path)
    capsys.readouterr()
    assert main(["check-model", folder, "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "quantised by  torchao\n" in out
    assert "weights       quantised (" in out


class Packed(torch.nn.Module):
    """An output embedding of four-bit numbers, with a bias."""

    def __init__(self, numbers: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = numbers.shape[1], numbers.shape[0]
        self.register_buffer("words", (numbers + 8).to(torch.uint8))
        self.bias = torch.nn.Parameter(torch.arange(numbers.shape[0]).float())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.words, torch.Tensor)
        return torch.nn.functional.linear(states, self.words.float() - 8, self.bias)


def test_a_packed_output_embedding_is_read_through_its_module() -> None:
    numbers = torch.randint(-8, 8, (12, 6))

    class Target(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.said = torch.nn.Embedding(12, 6), Packed(numbers)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.read

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.said

    shared = shared_weights(Target(), 10)
    assert torch.equal(shared.output_embedding, numbers[:10].float())
    assert shared.form.bias is not None
