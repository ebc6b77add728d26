"""Drafters from settings: all that are registered, guarded by the target's tokenizer, refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from drafters import MASKS
from server.config import Settings
from server.errors import StartupError
from server.worker.loading import DrafterNeeds, load_drafters, load_verifier
from tests.families import save_model
from verifier import load as loading_of_models
from verifier import model as model_loading
from verifier import options as sizing
from verifier.options import VerifierOptions, plan_memory
from verifier.probe import probe


def model_folder(folder: Path, words: str) -> str:
    """A folder with nothing but a tokenizer."""
    folder.mkdir()
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words.split())}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_every_registered_drafter_is_loaded_but_the_one_that_needs_a_head() -> None:
    drafters = load_drafters(DrafterNeeds(Settings(model="unread"), 3))
    assert list(drafters) == [name for name in MASKS if name != "ctc"]


def test_what_was_learned_comes_back_under_the_same_tokenizer_only(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    ours = Settings(model=model_folder(tmp_path / "ours", "a b c"), trigram_state=state)
    load_drafters(DrafterNeeds(ours, 3))["trigram"].save()
    assert "trigram" in load_drafters(DrafterNeeds(ours, 3))
    theirs = Settings(model=model_folder(tmp_path / "theirs", "a b d"), trigram_state=state)
    with pytest.raises(StartupError) as caught:
        load_drafters(DrafterNeeds(theirs, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["trigram_table", "trigram_state"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, option: str) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 100)
    settings = Settings(model=model_folder(tmp_path / "model", "a b c"), **{option: str(junk)})  # type: ignore[arg-type]
    with pytest.raises(StartupError, match="junk"):
        load_drafters(DrafterNeeds(settings, 3))


def test_a_table_needs_a_tokenizer_to_be_checked_against(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        load_drafters(DrafterNeeds(Settings(model=str(tmp_path / "model"), trigram_table="any"), 3))


@pytest.mark.parametrize(("free", "pages", "is_final"), [(0.0, 0, False), (1e12, 2, True)])
def test_too_little_free_memory_may_be_enough_later(
    free: float, pages: int, is_final: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where the pages take a share of what is free; a number that was asked for stays too small."""
    monkeypatch.setattr(sizing, "_kv_budget", lambda options, device: free)
    folder = save_model("llama", tmp_path)
    options = VerifierOptions(model=folder, num_pages=pages)

    def plan(_: VerifierOptions) -> None:
        plan_memory(options, probe(folder), ("float32", "cuda"))

    monkeypatch.setattr(loading_of_models, "load_backend", plan)
    with pytest.raises(StartupError, match="K/V pages of 16 tokens cannot hold") as caught:
        load_verifier(Settings(model=folder))
    assert caught.value.is_final is is_final


@pytest.mark.parametrize(("fault", "is_final"), [(MemoryError("no room"), False), (ValueError("broken"), True)])
def test_weights_without_room_may_have_some_later(
    fault: Exception, is_final: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **options: object) -> None:
        raise fault

    monkeypatch.setattr("verifier.model.AutoModelForCausalLM.from_pretrained", load)
    with pytest.raises(StartupError, match="cannot load the weights") as caught:
        load_verifier(Settings(model=save_model("llama", tmp_path), device="cpu", max_model_len=64))
    assert caught.value.is_final is is_final


@pytest.mark.parametrize(
    ("device", "has_accelerate", "device_map"),
    [("cuda", True, {"": "cuda"}), ("cuda", False, None), ("cpu", True, None)],
)
def test_weights_go_straight_to_a_gpu(
    device: str, has_accelerate: bool, device_map: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An 8B model staged on the host would need 16 GB of its memory."""
    network = SimpleNamespace(config=SimpleNamespace(), moved_to=None)
    network.eval = lambda: network
    network.requires_grad_ = lambda needed: network
    network.to = lambda target: (setattr(network, "moved_to", target), network)[1]
    asked: list[object] = []

    def load(*args: object, **kwargs: object) -> object:
        asked.append(kwargs["device_map"])
        return network, {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(model_loading.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(model_loading, "find_spec", lambda name: object() if has_accelerate else None)
    model_loading.load_network("some/model", "", torch.float32, device)
    assert asked == [device_map]
    assert network.moved_to == (None if device_map else device)
