"""The probe finds every layer's geometry without weights, and refuses by name and reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families import REFUSED, SERVED, make_config, make_refused_config, save_model
from verifier.load import load_backend
from verifier.model import ModelError
from verifier.options import VerifierOptions, choose_dtype
from verifier.probe import probe, probe_config


@pytest.mark.parametrize("family", SERVED)
def test_every_served_family_is_accepted(family: str) -> None:
    report = probe_config(make_config(family))
    assert report.refusals == ()
    assert len(report.layers) == 4
    assert report.max_model_len == 256
    assert report.num_parameters > 0


def test_geometry_is_what_the_layers_say() -> None:
    gemma = probe_config(make_config("gemma2")).layers
    assert [layer.window for layer in gemma] == [16, None, 16, None]
    assert {layer.softcap for layer in gemma} == {50.0}
    assert all(layer.has_sinks for layer in probe_config(make_config("gpt_oss")).layers)
    deepseek = probe_config(make_config("deepseek_v3"))
    assert [(layer.k_dim, layer.v_dim, layer.num_kv_heads) for layer in deepseek.layers] == [(16, 12, 4)] * 4
    assert deepseek.kv_bytes_per_token(2) == 4 * 4 * (16 + 12) * 2


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_are_refused_by_name(family: str) -> None:
    report = probe_config(make_refused_config(family))
    assert report.refusals
    text = " ".join(report.refusals)
    assert any(word in text for word in REFUSED[family][1].split("|")), text
    assert family.split("_")[0] in text.lower()


@pytest.mark.parametrize(
    ("stated", "rope", "limit"),
    [
        (64, {"rope_type": "default"}, 64),
        (64, {"rope_type": "linear", "factor": 2.0}, 128),
        (128, {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
        (64, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (64, {"rope_type": "yarn", "factor": 4.0}, 256),
        (256, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}, 256),
        (64, {"rope_type": "yarn", "factor": float("inf"), "original_max_position_embeddings": 64}, 64),
        # 8 x 64 is more than the model was trained for, and it says so.
        (256, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_a_scaled_rope_scales_the_context_once(stated: int, rope: dict[str, Any], limit: int) -> None:
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope["rope_type"] == "llama3" else {}
    config = make_config("llama", max_position_embeddings=stated, rope_parameters={"rope_theta": 1e4, **rope, **llama3})
    report = probe_config(config)
    assert (report.max_model_len, report.notes) == (limit, ())


def test_gemma3_states_the_context_after_scaling() -> None:
    rope = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "linear", "factor": 8.0}}
    assert probe_config(make_config("gemma3_text", rope_parameters=rope)).max_model_len == 256


def test_length_dependent_rope_limits_the_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    report = probe_config(make_config("llama", rope_parameters=rope))
    assert report.max_model_len == 256
    assert "256 tokens" in report.notes[0]
    factors = [1.0] * 4
    rope = {**rope, "rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    report = probe_config(make_config("llama", rope_parameters=rope))
    assert report.max_model_len == 64
    assert "64 tokens" in report.notes[0]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_auto_runs_in_sixteen_bits_only_what_was_stored_so(stored: str, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', f'"dtype": "{stored}"'))
    report = probe(folder)
    assert report.stored_dtype == stored
    assert choose_dtype("auto", "cpu", report, is_quick_in_16_bits=True) == stored


def test_broken_folders_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        probe(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        probe(str(tmp_path))
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match="cannot read the configuration"):
        probe(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError) as caught:
        probe(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_weights(tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    options = VerifierOptions(model=str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_backend(options)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_backend(options)


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    """Random weights in place of missing ones would be served as if nothing were wrong."""
    path = Path(save_model("llama", tmp_path))
    weights = load_file(path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"lack {re.escape(name)}$"):
        load_backend(VerifierOptions(model=str(path), device="cpu"))
    save_file({**weights, name: weights[name][:5].clone()}, path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"another shape {re.escape(name)}$"):
        load_backend(VerifierOptions(model=str(path), device="cpu"))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = Path(save_model("llama", tmp_path))
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle"):
        load_backend(VerifierOptions(model=str(path), device="cpu"))


def test_limits_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    with pytest.raises(ModelError, match="over the model's limit of 256"):
        load_backend(VerifierOptions(model=path, device="cpu", max_model_len=300))
    with pytest.raises(ModelError, match="cannot hold one request"):
        load_backend(VerifierOptions(model=path, device="cpu", num_pages=3))
