"""The ablations' own machinery, on toy models: one text whatever drafts, counts that add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from drafters.head.head import Head, HeadShape
from drafters.head.store import HeadError, HeadInfo, load_head, save_head
from tests.bench import drafters_ablation
from tests.bench.arms import ARMS, Makers
from tests.bench.decoding import Ask, Decoder, Tally, decode_all
from tests.bench.doubled_words import doubled
from tests.bench.tasks import Task
from tests.families import VOCAB, save_model
from verifier.fingerprint import model_fingerprint


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = Path(save_model("llama", tmp_path_factory.mktemp("model")))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (5, 70)]
    return Task("toy", folder, prompts, lambda: [], {}, 40, 2)


@pytest.fixture(scope="module")
def decoder(task: Task) -> Decoder:
    return Decoder(task)


@pytest.fixture(scope="module")
def makers(task: Task, decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Makers:
    """With a head of random weights."""
    torch.manual_seed(1)
    shared = decoder.shared_weights
    shape = HeadShape(
        vocab_size=VOCAB,
        embed_size=shared.input_embedding.shape[1],
        hidden_size=shared.hidden_size,
        width=32,
        ffn_size=48,
        window=16,
        bias_rank=4,
    )
    head = Head(shape)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path_factory.mktemp("head")
    info = HeadInfo(shape=shape, model="toy", fingerprint=model_fingerprint(str(task.folder)))
    save_head(folder, head, info)
    return Makers(task.folder, VOCAB, shared, "", folder)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_arm_writes_the_same_text(task: Task, decoder: Decoder, makers: Makers, temperature: float) -> None:
    comparison = drafters_ablation.Comparison(task, decoder, temperature)
    cells, _ = drafters_ablation.compare(comparison, makers, list(ARMS), [8])
    assert comparison.different == []
    assert all(len(text) > 20 for text in comparison.texts)
    assert cells["none"][8]["acceptance_length"] == 1.0
    assert cells["none"][8]["steps"] == sum(len(text) - 1 for text in comparison.texts)
    drafting = set(cells) - {"none", "suffix"}
    assert drafting == set(ARMS) - {"none", "suffix"} - ({"ctc-uncoupled"} if temperature == 0.0 else set())
    for name in drafting:
        assert cells[name][8]["drafted_per_step"] > 1.0, name


def test_another_text_is_told(task: Task, decoder: Decoder, makers: Makers) -> None:
    comparison = drafters_ablation.Comparison(task, decoder, 0.0)
    comparison.measure(makers.make("none"), "none", 1)
    comparison.texts[1][7] += 1
    comparison.measure(makers.make("trigram"), "trigram", 8)
    assert comparison.different == ["trigram, 8 nodes: prompt 1 from token 7 on"]


def test_a_tally_counts_what_is_won(task: Task, decoder: Decoder, makers: Makers) -> None:
    """Asked again, a drafter that learns knows the answer."""
    drafter, tallies = makers.make("trigram"), [Tally(), Tally()]
    answers = [decoder.answer(Ask(task.prompts[0], 16), drafter, tally) for tally in tallies]
    assert answers[0] == answers[1]
    for tally in tallies:
        assert tally.num_won == len(answers[0]) - 1 == tally.num_steps + tally.num_accepted
    assert tallies[1].acceptance_length > max(1.5, tallies[0].acceptance_length)


def test_prompts_have_seeds_of_their_own(task: Task, decoder: Decoder, makers: Makers) -> None:
    prompts = [task.prompts[0]] * 2
    _, answers = decode_all(decoder, prompts, makers.make("none"), 1, 1.0)
    assert answers[0] != answers[1]


def test_a_head_of_another_target_is_refused(makers: Makers, tmp_path: Path) -> None:
    assert makers.ctc_head is not None
    head, info = load_head(makers.ctc_head)
    save_head(tmp_path, head, replace(info, fingerprint="0" * 64, model="other"))
    with pytest.raises(HeadError, match="trained for other"):
        replace(makers, ctc_head=tmp_path).make("ctc")


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("The ticket costs $330.", []),
        ("I have have a table.", ["word"]),
        ("The the table", ["word"]),
        ("It is on the 11th, the hotel", []),
        ("Yes,, please. .", ["comma or period"]),
        ("a restaurantrestaurant", ["chunk"]),
        ("What is the area code 1010?", []),
    ],
)
def test_doubled_words(text: str, kinds: list[str]) -> None:
    assert doubled(text) == kinds
