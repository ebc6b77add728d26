"""The fingerprint of a target: the same for copies, another one for other weights, one clear line without any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import save_model
from verifier import fingerprint
from verifier.fingerprint import model_fingerprint
from verifier.model import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_model("llama", tmp_path / "model"))


def test_a_copy_is_the_same_target(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("a copy")
    save_file(load_file(copy / "model.safetensors"), copy / "model.safetensors", {"format": "pt", "by": "somebody"})
    assert model_fingerprint(str(copy)) == model_fingerprint(str(folder))


def test_every_tensor_counts(folder: Path) -> None:
    """A fine-tune may touch one kind of layer only."""
    weights = load_file(folder / "model.safetensors")
    seen = {model_fingerprint(str(folder))}
    for name, tensor in weights.items():
        changed = {**weights, name: tensor * 1.01 + 1e-3}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        seen.add(model_fingerprint(str(folder)))
    assert len(seen) == len(weights) + 1


def test_types_shapes_and_names_count(folder: Path) -> None:
    weights = {"a": torch.zeros(4, 6), "b": torch.zeros(5)}
    seen = set()
    for changed in (
        weights,
        {"a": weights["a"].T.contiguous(), "b": weights["b"]},
        {"a": weights["a"].view(torch.int32), "b": weights["b"]},
        {"a": weights["a"], "c": weights["b"]},
    ):
        save_file(changed, folder / "model.safetensors")
        seen.add(model_fingerprint(str(folder)))
    assert len(seen) == 4


def test_sharded_weights_are_read_as_their_index_says(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    whole = model_fingerprint(str(folder))
    save_file({"stray": torch.zeros(3)}, folder / "adapter.safetensors")
    assert model_fingerprint(str(folder)) == whole
    last = load_file(shards[-1])
    save_file({name: tensor + 1 for name, tensor in last.items()}, shards[-1])
    assert model_fingerprint(str(folder)) != whole
    shards[0].unlink()
    with pytest.raises(ModelError, match=shards[0].name):
        model_fingerprint(str(folder))


@pytest.mark.parametrize("fault", ["none", "cut", "header", "json", "entry", "index"])
def test_weights_that_are_not_there_are_one_line(folder: Path, fault: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if fault == "none":
        path.rename(folder / "pytorch_model.bin")
    elif fault == "index":
        path.rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text("[]")
    else:
        size = len(json.dumps({"a": {}}))
        broken = {"cut": data[:-5000], "header": data[:4], "json": data[:8] + b"\xff" + data[9:]}
        path.write_bytes(broken.get(fault, size.to_bytes(8, "little") + b'{"a": {}}'))
    with pytest.raises(ModelError) as caught:
        model_fingerprint(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_hub_id_is_read_from_its_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: str, name: str, revision: str | None) -> str:
        assert (model, revision) == ("some/model", "v2")
        if not (folder / name).is_file():
            raise EntryNotFoundError("no such file\nat all")
        return str(folder / name)

    monkeypatch.setattr(fingerprint, "hf_hub_download", download)
    assert model_fingerprint("some/model", "v2") == model_fingerprint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights as safetensors"):
        model_fingerprint("some/model", "v2")


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: str, name: str, revision: str | None) -> str:
        raise LocalEntryNotFoundError("offline\nand more")

    monkeypatch.setattr(fingerprint, "hf_hub_download", download)
    with pytest.raises(ModelError, match=r"cannot get 'some/model' from the Hub: offline$"):
        model_fingerprint("some/model")
