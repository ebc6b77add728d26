from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli import main
from server.commands.check_model import memory_plan, stored_weight_bytes, verdict
from server.config import SettingsError
from tests.api.model_folder import make_folder
from tests.families import save_model
from verifier.load import load_backend
from verifier.memory import PageDemand
from verifier.options import VerifierOptions
from verifier.probe import LayerGeometry, ProbeReport, probe

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip


def folder_of(tmp_path: Path, config: dict[str, object]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def layer(kv_heads: int) -> LayerGeometry:
    return LayerGeometry("a", 4, kv_heads, 8, 6, 0.1, None, None, has_sinks=False)


def report_of(*layers: LayerGeometry) -> ProbeReport:
    return ProbeReport("m", "X", "x", layers, 100, 32, 1000, 64)


def test_a_model_without_weights_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", folder_of(tmp_path, LLAMA), "--dtype", "bfloat16", "--kv-cache-gib", "1"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "0-2" in out
    assert "no weight files in the folder" in out
    # 3 layers, 2 K/V heads, width 8, keys and values, 2 bytes
    assert "192 bytes per token as bfloat16" in out
    assert out.endswith(f"can be served once {tmp_path} has tokenizer.json and its weights as *.safetensors\n")
    assert verdict(tmp_path, has_tokenizer=True) == f"can be served once {tmp_path} has its weights as *.safetensors"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert verdict(tmp_path, has_tokenizer=True) == "can be served"
    assert "neither was looked at" in verdict(Path("some/model"), has_tokenizer=True)


def test_the_tokenizer_is_read_as_the_server_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path)
    folder_of(folder, LLAMA)
    assert main(["check-model", str(folder)]) == 0
    assert "can be served once" in capsys.readouterr().out
    (folder / "tokenizer.json").write_text("{}")
    assert main(["check-model", str(folder)]) == 2
    refusal = capsys.readouterr().out.splitlines()[-1]
    assert refusal.startswith(f"refused: the tokenizer of {folder} cannot be read: tokenizer.json or a file beside it")


def test_a_refused_model_ends_with_code_2_and_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bloom = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "n_head": 2, "hidden_size": 32}
    assert main(["check-model", folder_of(tmp_path, {**bloom, "vocab_size": 99, "seq_length": 64})]) == 2
    captured = capsys.readouterr()
    refusal = [line for line in (captured.out + captured.err).splitlines() if "oom" in line and "model  " not in line]
    assert refusal
    assert "can be served" not in captured.out


def test_what_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "has no config.json" in err
    assert err.count("\n") == 1


def test_the_memory_plan_counts_layers_as_they_are() -> None:
    report = report_of(layer(2), layer(1))
    page_bytes = 3 * 14 * 4 * 16
    plan = memory_plan(report, "float32", page_bytes * 41, PageDemand(64, 16, 64))
    assert plan.kv_bytes_per_token == (2 + 1) * (8 + 6) * 4
    assert plan.num_pages == 41
    assert plan.weight_bytes == 4000
    assert "41 pages of 16, 640 tokens, 10.0 requests of 64 tokens" in "\n".join(plan.lines(None))
    assert memory_plan(report, "float32", page_bytes * 41, PageDemand(64, 16, 3)).num_pages == 3 * 4 + 1
    with pytest.raises(SettingsError, match="gives 4 pages of 16 tokens, one request of 64 tokens needs 5"):
        memory_plan(report, "float32", page_bytes * 4, PageDemand(64, 16, 64))
    assert memory_plan(report, "float32", page_bytes * 5, PageDemand(64, 16, 64)).num_pages == 5
    with pytest.raises(SettingsError, match="the model's limit is 64, got 65"):
        memory_plan(report, "float32", page_bytes * 40, PageDemand(65, 16, 64))


@pytest.mark.parametrize("num_pages", [5, 16, 17, 18, 100])
def test_the_memory_plan_is_the_servers(num_pages: int, tmp_path: Path) -> None:
    path = save_model("llama", tmp_path)
    report = probe(path)
    gib = num_pages * 16 * report.kv_bytes_per_token(4) / 2**30
    plan = memory_plan(report, "float32", int(gib * 2**30), PageDemand(60, 16, 4))
    verifier = load_backend(
        VerifierOptions(
            model=path, device="cpu", dtype="float32", max_model_len=60, page_size=16, max_rows=4, kv_cache_gib=gib
        )
    )
    assert plan.num_pages == verifier.geometry.num_pages == min(num_pages, 17)


def test_fewer_requests_need_a_smaller_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, LLAMA)
    assert main(["check-model", folder, "--max-num-seqs", "2"]) == 0
    assert f"{2 * 512 // 16 + 1} pages of 16" in capsys.readouterr().out
    assert main(["check-model", folder, "--max-num-seqs", "0"]) == 2
    assert "--max-num-seqs: must be 1 to 1024" in capsys.readouterr().err


def test_weights_on_disk_are_counted_from_the_index_or_the_files(tmp_path: Path) -> None:
    assert stored_weight_bytes(tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 5)
    assert stored_weight_bytes(tmp_path) == 15
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 123}}')
    assert stored_weight_bytes(tmp_path) == 123
