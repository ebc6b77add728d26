"""A compiled pass may be off by what rounding costs the network it runs, and by no more."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.families import VOCAB, save_model
from verifier.attention import LayerKV
from verifier.cuda.yardstick import CausalAttention, Yardstick, widened
from verifier.model import KV_ATTRIBUTE, Pass, Target, attention_modules, load_network
from verifier.probe import probe

NUM_POSITIONS = 60


def load_target(folder: str, dtype: torch.dtype) -> Target:
    report = probe(folder)
    network = load_network(folder, "", dtype, "cpu")
    for module, layer in zip(
        attention_modules(network, [one.name for one in report.layers]), report.layers, strict=True
    ):
        setattr(module, KV_ATTRIBUTE, LayerKV(torch.empty(0), torch.empty(0), layer))
    return Target(network)


def plain_pass(target: Target, yardstick: Yardstick) -> Pass:
    return target(*yardstick.example(NUM_POSITIONS), CausalAttention())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_pass_that_rounds_less_than_the_plain_one_is_allowed(family: str, tmp_path: Path) -> None:
    """In float32, rounded once: a plain pass in bfloat16 is far from it, above all where experts are chosen."""
    target = load_target(save_model(family, tmp_path, num_hidden_layers=8), torch.bfloat16)
    with torch.no_grad():
        yardstick = Yardstick(target, VOCAB, NUM_POSITIONS)
        with widened(target.network):
            logits, states = plain_pass(target, yardstick)
        assert logits.dtype == torch.float32
        assert states is not None
        assert yardstick.measure([(0, (logits.bfloat16(), states.bfloat16()))]) <= 1.0


def without_one_input(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x[..., :-1], self.weight[:, :-1], self.bias)


def with_weights_of_8_bits(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, self.weight.to(torch.float8_e4m3fn).to(x.dtype), self.bias)


def with_sums_in_16_bits(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(*x.shape[:-1], self.out_features, dtype=torch.bfloat16)
    for k in range(self.in_features):
        total = total + x[..., k : k + 1] * self.weight[:, k].bfloat16()
    return total.to(x.dtype)


WRONG = (without_one_input, with_weights_of_8_bits, with_sums_in_16_bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_wrong_product_is_refused(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(save_model("llama", tmp_path), dtype)
    with torch.no_grad():
        yardstick = Yardstick(target, VOCAB, NUM_POSITIONS)
        assert yardstick.measure([(0, plain_pass(target, yardstick))]) <= 0.7
        for wrong in WRONG:
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.Linear, "forward", wrong)
                assert yardstick.measure([(0, plain_pass(target, yardstick))]) > 1.0, wrong.__name__


def test_one_wrong_row_is_refused_wherever_it_is(tmp_path: Path) -> None:
    target = load_target(save_model("llama", tmp_path), torch.bfloat16)
    with torch.no_grad():
        yardstick = Yardstick(target, VOCAB, NUM_POSITIONS)
        logits, states = plain_pass(target, yardstick)
        tail = (50, (logits[50:52], states[50:] if states is not None else None))
        assert yardstick.measure([(0, (logits, states)), tail]) <= 0.7
        for value, limit in ((0.0, 1.0), (torch.nan, float("inf"))):
            wrong = logits.clone()
            wrong[41] = value
            found = yardstick.measure([(0, (wrong, states)), tail])
            assert found == limit if limit > 1.0 else found > 1.0


def test_a_lack_of_memory_is_no_reason_for_a_wide_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(save_model("llama", tmp_path), torch.bfloat16)
    linear = torch.nn.functional.linear

    def no_room(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == torch.float32:
            raise torch.OutOfMemoryError("no room")
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", no_room)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        Yardstick(target, VOCAB, NUM_POSITIONS)


def test_a_plain_pass_that_is_no_number_allows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target(save_model("llama", tmp_path), torch.bfloat16)
    linear = torch.nn.functional.linear

    def overflows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = linear(x, weight, bias)
        return found if x.dtype == torch.float32 else found * torch.inf * 0.0

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", overflows)
            yardstick = Yardstick(target, VOCAB, NUM_POSITIONS)
        assert yardstick.measure([(0, plain_pass(target, yardstick))]) == float("inf")


@pytest.mark.parametrize("is_quantised", [True, False])
def test_only_quantised_weights_that_do_not_run_in_float32_are_compared_with_themselves(
    is_quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = load_target(save_model("llama", tmp_path), torch.bfloat16)
    target.network.is_quantized = is_quantised  # type: ignore[assignment]
    weights = {name: weight.data_ptr() for name, weight in target.network.named_parameters()}
    linear = torch.nn.functional.linear

    def narrow_alone(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == torch.float32:
            raise TypeError("no such kernel")
        return linear(x, weight, bias)

    with torch.no_grad(), monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch.nn.functional, "linear", narrow_alone)
        if not is_quantised:
            with pytest.raises(RuntimeError, match="float32 does not run: no such kernel"):
                Yardstick(target, VOCAB, NUM_POSITIONS)
            return
        yardstick = Yardstick(target, VOCAB, NUM_POSITIONS)
        right = plain_pass(target, yardstick)
        patch.setattr(torch.nn.Linear, "forward", without_one_input)
        wrong = plain_pass(target, yardstick)
    assert "does not run in float32: no such kernel" in caplog.text
    assert yardstick.measure([(0, right)]) == 0.0
    assert yardstick.measure([(0, wrong)]) > 1.0
    assert weights == {name: weight.data_ptr() for name, weight in target.network.named_parameters()}
