"""What the target teaches a head beyond its tokens: whole distributions, and how much the noise says beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafters.coupling import MOST_FACTOR, UNFITTED, Coupling
from drafters.head.store import HeadError, HeadInfo, load_head, save_head
from tests.families import VOCAB, save_model
from tests.unit.test_ctc_train import EMBEDDINGS, PLAIN, SHAPE, SIZE, make_head, make_record
from training.dataset import collate
from training.draws import Draws, draws_of, fit
from training.loss import taught_losses
from training.objective import Teacher, surprise
from verifier.weights import shared_weights

# ---- the teacher


SCALES: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
}
"""What the families' own defaults would leave at 1, or too far out to be seen in small models."""


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2"])
def test_logits_from_states_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    path = save_model(family, tmp_path, **SCALES.get(family, {}))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = model(tokens, output_hidden_states=True)
        weights = shared_weights(model, VOCAB)
        mine = weights.form.apply(said.hidden_states[-1] @ weights.output_embedding.T)
    torch.testing.assert_close(mine, said.logits.float(), atol=1e-4, rtol=1e-4)


def test_a_lesson_is_the_distribution_at_every_label() -> None:
    records = [make_record(0, 5, 9, 0.7), make_record(1, 3, 6), make_record(2, 6, 7, 1.0)]
    batch = collate(records, SIZE, np.random.default_rng(0), is_hiding=False)
    teacher = Teacher(make_head(), EMBEDDINGS, batch)
    assert teacher.is_sampled.view(3, -1).all(1).tolist() == [True, False, True]
    places = teacher.is_sampled.nonzero()[:, 0]
    lesson = teacher.chances(places)
    for place, anchor_number in enumerate(places.tolist()):
        row, anchor = divmod(anchor_number, SIZE.anchors)
        for label in np.flatnonzero(batch.is_label[row, anchor]).tolist():
            index = int(batch.anchors[row, anchor]) + 1 + label  # of the state that predicted the label
            logits = EMBEDDINGS.output_embedding @ batch.states[row, index]
            expected = torch.softmax(logits / records[row].temperature, -1)
            torch.testing.assert_close(lesson[place, label], expected)


def test_a_taught_loss_is_least_where_the_head_agrees() -> None:
    chances = torch.softmax(torch.randn(5, 3, 11, generator=torch.Generator().manual_seed(0)), -1)
    scores = chances.log().clone().requires_grad_(True)
    losses = taught_losses(scores, chances)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert gradient.abs().max() < 1e-6
    assert (taught_losses(scores + torch.randn(5, 3, 11), chances) > losses).all()


def test_only_sampled_answers_are_taught_so(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [make_record(0, 5, 9), make_record(1, 5, 9, 0.7)]
    batch = collate(records, SIZE, np.random.default_rng(0), is_hiding=False)
    asked: list[int] = []
    chances = Teacher.chances

    def told(teacher: Teacher, anchors: torch.Tensor) -> torch.Tensor:
        asked.extend(anchors.tolist())
        return chances(teacher, anchors)

    monkeypatch.setattr(Teacher, "chances", told)
    with torch.no_grad():
        plain = surprise(make_head(), EMBEDDINGS, batch, PLAIN)
    assert asked == [], "a measurement needs no teacher"
    assert surprise(make_head(), EMBEDDINGS, batch, PLAIN) == pytest.approx(plain, rel=1e-6)
    assert asked == [*range(SIZE.anchors, 2 * SIZE.anchors)]


# ---- the coupling


def draws(spread: float, num_places: int = 1500, seed: int = 0) -> Draws:
    """A head that knows the target's distributions up to what it cannot know: normal noise of this spread."""
    stream = torch.Generator().manual_seed(seed)
    log_q = torch.log_softmax(2.0 * torch.randn(num_places, 2, 30, generator=stream), -1)
    log_p = torch.log_softmax(log_q + spread * torch.randn(num_places, 2, 30, generator=stream), -1)
    return Draws(1.0, log_q, log_p, torch.ones(num_places, 2, dtype=torch.bool))


def surprise_of(coupling: Coupling, part: Draws, seed: int) -> float:
    """Mean surprise of draws with other noise than the fit's."""
    stream = torch.Generator().manual_seed(seed)
    noise = -torch.log(torch.empty(part.log_p.shape).exponential_(generator=stream))
    winner = (part.log_p + noise).argmax(-1)
    factors = torch.from_numpy(coupling.at(1.0)).float()
    standings = factors[:, :1] * part.log_q + factors[:, 1:] * noise
    return float(torch.nn.functional.cross_entropy(standings.flatten(0, 1), winner.flatten()))


def test_the_better_a_head_knows_the_target_the_more_the_noise_counts() -> None:
    reaches = [fit(2, [draws(spread)]).factors[0, :, 1].mean() for spread in (0.1, 0.7, 2.0)]
    assert reaches[0] > reaches[1] > reaches[2]
    assert reaches[2] < 1.0
    for spread in (0.3, 3.0):
        fitted = surprise_of(fit(2, [draws(spread)]), draws(spread, seed=1), 7)
        assert fitted < surprise_of(Coupling.unfitted(2), draws(spread, seed=1), 7)


def test_a_candidate_does_not_stand_beside_itself() -> None:
    exact = fit(2, [draws(0.0)])
    assert (exact.factors > 0.9 * MOST_FACTOR).all(), "an exact head deserves the utmost"


def test_too_few_draws_fit_nothing() -> None:
    part = draws(1.0)
    part.is_label[:, 1] = False
    factors = fit(2, [part]).factors[0]
    assert (factors[0] != UNFITTED).all()
    assert (factors[1] == UNFITTED).all()
    assert (fit(2, [draws(1.0, num_places=20)]).factors == UNFITTED).all()
    assert fit(3, []).factors.shape == (1, 3, 2)


def test_factors_between_and_beyond_the_fitted_temperatures() -> None:
    coupling = Coupling((0.5, 1.0), np.array([[[1.0, 0.4]], [[2.0, 0.8]]]))
    assert coupling.at(0.5)[0].tolist() == [1.0, 0.4]
    assert coupling.at(0.75)[0].tolist() == pytest.approx([1.5, 0.6])
    assert coupling.at(1.7)[0].tolist() == [2.0, 0.8]
    assert coupling.at(0.25)[0].tolist() == [1.0, 0.2]
    assert coupling.at(0.0)[0].tolist() == [1.0, 0.0]


def test_draws_are_what_head_and_target_say_at_the_same_places() -> None:
    records = [make_record(0, 5, 9, 0.7), make_record(2, 4, 8, 1.0)]
    found = list(draws_of(make_head(), EMBEDDINGS, records, SIZE, PLAIN))
    assert [part.temperature for part in found] == [0.7, 1.0]
    for part in found:
        assert part.log_q.shape == part.log_p.shape == (*part.is_label.shape, SHAPE.vocab_size)
        torch.testing.assert_close(part.log_q.exp().sum(-1), torch.ones(part.is_label.shape))
        torch.testing.assert_close(part.log_p.exp().sum(-1), torch.ones(part.is_label.shape))


def test_a_coupling_survives_the_disk_and_a_broken_one_is_told(tmp_path: Path) -> None:
    factors = np.linspace(0.2, 1.2, 2 * SHAPE.num_slots * 2).reshape(2, SHAPE.num_slots, 2)
    info = HeadInfo(shape=SHAPE, model="m", fingerprint="f", coupling=Coupling((0.7, 1.0), factors))
    save_head(tmp_path, make_head(), info)
    found = load_head(tmp_path)[1].coupling
    assert found is not None
    assert found.temperatures == (0.7, 1.0)
    np.testing.assert_array_equal(found.factors, factors)
    path = tmp_path / "head.json"
    for change, word in (
        ({"temperatures": [1.0, 0.7], "factors": factors.tolist()}, "rise"),
        ({"temperatures": [0.7], "factors": factors.tolist()}, "shape"),
        ({"temperatures": [0.7, 1.0], "factors": (factors * 9).tolist()}, "between"),
        ({"temperatures": ["x"], "factors": []}, "no number"),
        ({"temperatures": [0.7, float("nan")], "factors": factors.tolist()}, "rise"),
        ([1.0], "must hold"),
    ):
        value: dict[str, Any] = json.loads(path.read_text())
        value["coupling"] = change
        path.write_text(json.dumps(value))
        with pytest.raises(HeadError, match=rf"head\.json: coupling .*{word}"):
            load_head(tmp_path)
