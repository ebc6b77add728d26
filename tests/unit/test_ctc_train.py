from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafters.base import HiddenStates, News, RowContext
from drafters.calibration import first_worth
from drafters.drafter import TreeView
from drafters.head.files import FileError
from drafters.head.head import Head, HeadShape
from drafters.head.source import HeadSource
from drafters.head.store import HeadError, HeadInfo, load_head, save_head
from server.errors import StartupError
from tests.drafting import make_view
from training import objective as objective_module
from training.acceptance import acceptance_length
from training.answer_store import AnswerStore, DataPlan, Record
from training.checkpoint import CHECKPOINT_FILE, LOG_FILE
from training.dataset import BatchSize, Dataset, collate, is_looping
from training.objective import continuations_of, slot_states, surprise
from training.train import Trainer, TrainOptions
from verifier.tree import DraftTrees, walk
from verifier.weights import SharedWeights

VOCAB, HIDDEN = 40, 16
SHAPE = HeadShape(
    vocab_size=VOCAB,
    embed_size=HIDDEN,
    hidden_size=HIDDEN,
    width=16,
    num_layers=1,
    num_heads=2,
    ffn_size=16,
    num_slots=4,
    window=6,
    residual_rank=4,
    bias_rank=4,
)
SIZE = BatchSize(rows=4, anchors=5, labels=4)
PLAIN = torch.autocast("cpu", enabled=False)


def make_target() -> SharedWeights:
    stream = torch.Generator().manual_seed(1)
    input_embedding = torch.randn(VOCAB, HIDDEN, generator=stream)
    return SharedWeights(input_embedding, torch.randn(VOCAB, HIDDEN, generator=stream) * 0.3, HIDDEN)


EMBEDDINGS = make_target()


def make_head(seed: int = 0, **changes: Any) -> Head:
    torch.manual_seed(seed)
    head = Head(replace(SHAPE, **changes))
    for table in (head.residual_out, head.bias_to) if head.shape.bias_rank else (head.residual_out,):
        torch.nn.init.normal_(table, std=0.5)
    return head


def make_record(number: int, num_prompt: int = 5, num_answer: int = 9, temperature: float = 0.0) -> Record:
    """An answer that counts up from a number that its first state tells: easy to learn."""
    stream = np.random.default_rng(number)
    tokens = (int(stream.integers(VOCAB)) + np.arange(num_prompt + num_answer)) % VOCAB
    states = EMBEDDINGS.input_embedding.numpy()[tokens[:-1]] + stream.normal(size=(tokens.size - 1, HIDDEN)) * 0.1
    return Record(tokens.astype(np.int32), states.astype(np.float16), 3, num_answer, temperature, number)


def make_store(folder: Path, records: list[Record]) -> AnswerStore:
    plan = DataPlan(
        fingerprint="f",
        corpus="c",
        num_answers=len(records),
        max_tokens=16,
        max_model_len=64,
        window=6,
        hidden_size=HIDDEN,
        seed=0,
    )
    store = AnswerStore(folder, plan)
    for shard in range(plan.num_shards):
        store.put(shard, [records[number] for number in plan.answers(shard)])
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AnswerStore:
    return make_store(tmp_path_factory.mktemp("data"), [make_record(number) for number in range(60)])


# ---- batches


def test_batches_are_a_function_of_seed_and_step(store: AnswerStore) -> None:
    one, two = Dataset(store, SIZE, 0), Dataset(store, SIZE, 0)
    later = one.batch(30)
    for step in (31, 2, 30):
        found = two.batch(step)
    assert torch.equal(found.tokens, later.tokens)
    assert torch.equal(found.anchors, later.anchors)
    assert torch.equal(found.starts, later.starts)
    assert not torch.equal(one.batch(31).tokens, later.tokens)
    assert not torch.equal(Dataset(store, SIZE, 1).batch(30).tokens, later.tokens)


def test_the_answers_are_shuffled_once_an_epoch(store: AnswerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stand in the order that they always had for a seed and an epoch, also where a batch ends an epoch."""
    dataset = Dataset(store, replace(SIZE, rows=7), 0)
    made, count = np.random.default_rng, dataset.num_training
    assert count % 7, "a batch is of two epochs"
    orders = [made([0, 0, epoch]).permutation(count) for epoch in range(3)]
    taken: list[int] = []
    record = dataset._record
    monkeypatch.setattr(
        dataset, "_record", lambda place: (taken.append(dataset._places.index(place)), record(place))[1]
    )
    epochs: list[int] = []

    def watched(seed: list[int]) -> np.random.Generator:
        if seed[1] == 0:
            epochs.append(seed[2])
        return made(seed)

    monkeypatch.setattr("training.dataset.np.random.default_rng", watched)
    for step in range(2 * count // 7):
        dataset.batch(step)
    assert taken == np.concatenate(orders)[: len(taken)].tolist()
    assert epochs == [0, 1]


def test_an_epoch_shows_every_answer_once_and_nothing_held_out(store: AnswerStore) -> None:
    dataset = Dataset(store, SIZE, 0)
    assert dataset.num_training % SIZE.rows == 0, "else an epoch ends within a batch"
    assert dataset.num_training + dataset.num_held_out == 60
    seen: list[bytes] = []
    for step in range(dataset.num_training // SIZE.rows):
        seen += [row.numpy().tobytes() for row in dataset.batch(step).states]
    assert len(set(seen)) == dataset.num_training
    held = [record.states.astype(np.float32).tobytes() for record in dataset.held_out(99)]
    assert not set(held) & set(seen)


def test_what_is_held_out_is_held_out_by_text(tmp_path: Path) -> None:
    records = [replace(make_record(number), document=number // 10) for number in range(60)]
    dataset = Dataset(make_store(tmp_path, records), SIZE, 0)
    documents = {record.document for record in dataset.held_out(99)}
    assert dataset.num_held_out == 10 * len(documents)


@pytest.mark.parametrize("count", [0, 5, 7])
def test_fewer_answers_than_two_batches_are_refused(tmp_path: Path, count: int) -> None:
    short = [make_record(number, num_answer=1) for number in range(20)]  # nothing to guess in them
    store = make_store(tmp_path, [*(make_record(number) for number in range(count)), *short])
    with pytest.raises(StartupError, match=rf"^{count} usable answers are too few: 4 to train on .* lower --batch$"):
        Dataset(store, SIZE, 0)


def test_labels_are_the_tokens_behind_each_place() -> None:
    records = [make_record(0, 5, 9), make_record(1, 2, 4), make_record(2, 1, 2)]
    batch = collate(records, replace(SIZE, anchors=12), np.random.default_rng(0), is_hiding=True)
    for row, record in enumerate(records):
        num_places = record.num_answer - 1
        assert batch.is_label[row, :, 0].sum() == num_places
        for place in range(num_places):
            index = record.tokens.size - record.num_answer + place  # of the token to go on from
            assert batch.anchors[row, place] == index - 1
            assert batch.tokens[row, index - 1] == record.tokens[index]
            assert batch.positions[row, index - 1] == record.first + index
            behind = record.tokens[index + 1 : index + 1 + SIZE.labels].tolist()
            assert batch.labels[row, place][batch.is_label[row, place]].tolist() == behind
        assert batch.starts[row] <= record.tokens.size - record.num_answer - 1


# ---- the objective


def learned(head: Head, records: list[Record], target: SharedWeights = EMBEDDINGS) -> float:
    """The surprise of all places of some records; gradients are left in the head."""
    batch = collate(records, replace(SIZE, anchors=20), np.random.default_rng(0), is_hiding=False)
    return surprise(head, target, batch, PLAIN)


def test_training_sees_what_the_source_sees() -> None:
    head, record = make_head(), make_record(0, 9, 8, temperature=0.7)
    batch = collate([record], replace(SIZE, anchors=7), np.random.default_rng(0), is_hiding=False)
    with torch.no_grad():
        slots = slot_states(head, EMBEDDINGS, batch)
        mine = torch.softmax(head.logits(slots[0], EMBEDDINGS.output_embedding), dim=-1).numpy()
    source = HeadSource(head, EMBEDDINGS, max_rows=2)
    states = torch.from_numpy(record.states.astype(np.float32))
    read = 0
    for place, anchor in enumerate(batch.anchors[0].tolist()):
        count = anchor + 1 - read
        positions = record.first + np.arange(read, anchor + 1, dtype=np.int64)
        following = record.tokens[read + 1 : anchor + 2].astype(np.int64)
        source.take(np.ones(count, np.int32), positions, states[read : anchor + 1], following)
        read = anchor + 1
        theirs = source.guess(np.array([1], np.int32), np.array([0.7]))[1][0]
        np.testing.assert_allclose(mine[place], theirs, atol=1e-5)


def test_padding_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "_GAMMA", 1.0)
    records = [make_record(0, 5, 9), make_record(1, 2, 4), make_record(2, 6, 7)]
    together, apart = make_head(), make_head()
    counts = [sum(min(4, left) for left in range(1, record.num_answer)) for record in records]
    loss, losses = learned(together, records), []
    gradients = {name: torch.zeros_like(value) for name, value in apart.named_parameters()}
    for record, count in zip(records, counts, strict=True):
        apart.zero_grad()
        losses.append(learned(apart, [record]) * count / sum(counts))
        for name, value in apart.named_parameters():
            gradients[name] += torch.zeros(()) if value.grad is None else value.grad * count / sum(counts)
    assert loss == pytest.approx(sum(losses), rel=1e-5)
    found = {name: value.grad for name, value in together.named_parameters() if value.grad is not None}
    assert set(found) >= {"from_state.weight", "to_state.weight", "bias_to", "slots", "layers.0.qkv.weight"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], msg=name)


@pytest.mark.parametrize("draft_vocab_size", [0, 30])
def test_scores_in_turns_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch, draft_vocab_size: int) -> None:
    records = [make_record(number, temperature=0.7 * (number % 2)) for number in range(4)]
    gradients = []
    for most in (2**26, 3 * SHAPE.num_slots * (VOCAB + 1)):
        monkeypatch.setattr(objective_module, "_CPU_SCORES", most)
        head = make_head(draft_vocab_size=draft_vocab_size)
        loss = learned(head, records)
        gradients.append({name: value.grad for name, value in head.named_parameters() if value.grad is not None})
    assert set(gradients[0]) >= {"from_state.weight", "to_state.weight", "bias_to", "slots", "layers.0.qkv.weight"}
    assert loss > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_what_the_frames_cannot_spell_is_left_out() -> None:
    head = make_head()
    record = replace(make_record(0, 5, 5), tokens=np.full(10, 7, np.int32))  # each repeat takes a frame more
    batch = collate([record], replace(SIZE, anchors=1), np.random.default_rng(0), is_hiding=False)
    assert batch.is_label.sum() >= 1
    found = surprise(head, EMBEDDINGS, batch, PLAIN)
    assert head.slots.grad is not None
    assert head.slots.grad.isfinite().all()
    assert found < 20, "a label that cannot be spelt would cost thousands"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_vocabulary_is_learned_as_a_target_that_has_no_other_tokens(temperature: float) -> None:
    even = [replace(one, tokens=one.tokens // 2 * 2) for one in (make_record(n, 5, 9, temperature) for n in range(3))]
    short = make_head(draft_vocab_size=VOCAB // 2)
    short.load_state_dict(short.state_dict() | {"draft_tokens": torch.arange(0, VOCAB, 2)})
    whole = make_head(vocab_size=VOCAB // 2)
    whole.load_state_dict(
        {name: weight for name, weight in short.state_dict().items() if name != "draft_tokens"}
        | {"bias_from": short.bias_from.detach()[:-1]}
    )
    # A target that has only the even tokens, under other names: token 2 k is token k.
    renamed = SharedWeights(EMBEDDINGS.input_embedding[::2], EMBEDDINGS.output_embedding[::2], HIDDEN)
    found = []
    for head, target, records in (
        (short, EMBEDDINGS, even),
        (whole, renamed, [replace(one, tokens=one.tokens // 2) for one in even]),
    ):
        batch = collate(records, SIZE, np.random.default_rng(0), is_hiding=False)
        found.append((surprise(head, target, batch, PLAIN), head.slots.grad, head.bias_to.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for mine, wanted in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_token_outside_the_draft_vocabulary_ends_the_label() -> None:
    head = make_head(draft_vocab_size=30)
    record = replace(make_record(0, 5, 5), tokens=np.array([1, 2, 3, 4, 5, 35, 7, 8, 39, 9], np.int32))
    batch = collate([record], replace(SIZE, anchors=4), np.random.default_rng(0), is_hiding=False)
    texts = continuations_of(head, batch)
    assert batch.anchors.tolist() == [[4, 5, 6, 7]]
    assert texts.roots.tolist() == [30, 7, 8, 30], "one place more stands for all others"
    assert texts.is_label.sum(1).tolist() == [2, 1, 0, 1]
    assert texts.labels[0, :2].tolist() == [7, 8]
    assert np.isfinite(surprise(head, EMBEDDINGS, batch, PLAIN))
    assert head.slots.grad is not None
    assert head.slots.grad.isfinite().all()


def test_nothing_is_learned_where_an_answer_goes_round_in_circles(store: AnswerStore) -> None:
    tokens = np.array([*range(10), *range(20, 29), 33, *range(20, 29), 33, *range(20, 24)], np.int32)
    assert np.flatnonzero(is_looping(tokens)).tolist() == [*range(27, 34)]
    record = Record(tokens, np.zeros((tokens.size - 1, HIDDEN), np.float16), 0, 20, 0.0, 0)
    batch = collate([record], replace(SIZE, anchors=30), np.random.default_rng(0), is_hiding=False)
    assert batch.anchors[0, : int(batch.is_label[0, :, 0].sum())].tolist() == [*range(13, 26)]


def test_the_draft_vocabulary_is_what_answers_say_most(tmp_path: Path) -> None:
    said = [np.array([1, 2, *answer], np.int32) for answer in ([3, 3, 3, 5, 5], [3, 5, 9, 9, 7])]
    records = [replace(make_record(number, 2, 5), tokens=said[number % 2]) for number in range(40)]
    assert Dataset(make_store(tmp_path, records), SIZE, 0).draft_tokens(VOCAB, 3).tolist() == [3, 5, 9]


# ---- acceptance


@pytest.mark.parametrize("draft_vocab_size", [0, 30])
def test_acceptance_is_what_the_drafter_wins_in_service(
    store: AnswerStore, tmp_path: Path, draft_vocab_size: int
) -> None:
    options = TrainOptions(steps=60, lr=0.02, size=SIZE)
    head = make_head(draft_vocab_size=draft_vocab_size)
    trainer = Trainer(head, EMBEDDINGS, Dataset(store, SIZE, 0), options, tmp_path)
    trainer.run(shows_progress=False)
    records = [make_record(number, 7, 12) for number in range(100, 106)]
    records += [looping_record(number) for number in range(106, 109)]
    found = acceptance_length(trainer.head, EMBEDDINGS, records, 8)
    served = make_view("ctc", VOCAB, head=HeadSource(trainer.head, EMBEDDINGS))
    won = [replay(served, record, 8) for record in records]
    assert found == pytest.approx(sum(sum(tokens) for tokens in won) / sum(map(len, won)))
    assert found > 1.3, "a head that guesses nothing proves nothing"


def looping_record(number: int) -> Record:
    """Counts, begins anew, and counts on: the places of the circle lie in the middle of the answer."""
    record = make_record(number, 7, 33)
    tokens = np.concatenate([record.tokens[:12], record.tokens[:28]])
    assert np.flatnonzero(is_looping(tokens)).tolist() == [*range(19, 24)]
    return replace(record, tokens=tokens, states=EMBEDDINGS.input_embedding.numpy()[tokens[:-1]].astype(np.float16))


def replay(drafter: TreeView, record: Record, max_nodes: int) -> list[int]:
    """Tokens won by each step, the drafter being told what the engine would tell it."""
    first, states = record.first, torch.from_numpy(record.states.astype(np.float32))
    tokens = [0] * first + record.tokens.tolist()
    known = len(tokens) - record.num_answer
    drafter.start(0, RowContext("t", tuple(tokens[:known]), known, 0, 0.0))
    told, steps = first, []
    row = np.zeros(1, np.int32)

    def tell(count: int) -> None:
        nonlocal known, told
        ends = known + count - 1  # the state at p predicts the token at p + 1
        part = states[told - first : ends - first]
        hidden = HiddenStates(row, np.array([0, part.shape[0]], np.int32), np.array([told]), part)
        won = np.array(tokens[known : known + count], np.int64)
        drafter.update(News(row, np.array([0, count], np.int32), won, None, hidden))
        known, told = known + count, ends

    tell(1)
    out = DraftTrees.allocate(1)
    while known < len(tokens):
        out.clear()
        drafter.drafter.memory.worth[:] = first_worth()  # what acceptance taught is left out
        drafter.propose(row, np.array([max_nodes], np.int32), out)
        future = [*tokens[known:], -1]
        accepted = len(walk(out, 0, lambda _, won, future=future: future[len(won)])[1])
        steps.append(min(accepted + 1, len(tokens) - known))
        tell(steps[-1])
    return steps


# ---- the run

OPTIONS = TrainOptions(steps=24, lr=0.02, size=SIZE, data="key")


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def make_trainer(store: AnswerStore, folder: Path, **changes: Any) -> Trainer:
    return Trainer(make_head(), EMBEDDINGS, Dataset(store, SIZE, 0), replace(OPTIONS, **changes), folder)


def test_a_run_learns_and_keeps_its_best_weights(store: AnswerStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, steps=80)
    state = trainer.run(shows_progress=False)
    held = read_log(tmp_path)
    assert [line["step"] for line in held] == list(range(10, 81, 10))
    assert held[-1]["held_out_loss"] < 0.7 * held[0]["held_out_loss"]
    assert held[-1]["acceptance_length"] > held[0]["acceptance_length"]
    assert state.best_loss == pytest.approx(min(line["held_out_loss"] for line in held), abs=1e-4)


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(store: AnswerStore, tmp_path: Path) -> None:
    whole = make_trainer(store, tmp_path / "whole")
    whole.run(shows_progress=False)
    cut = make_trainer(store, tmp_path / "cut")
    step, count = cut._step, 0

    def stop() -> Any:
        nonlocal count
        count += 1
        if count == 14:
            raise KeyboardInterrupt
        return step()

    cut._step = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.run(shows_progress=False)
    again = make_trainer(store, tmp_path / "cut")
    assert again.state.step == 10
    again.run(shows_progress=False)
    for name, tensor in whole.head.state_dict().items():
        assert torch.equal(tensor, again.head.state_dict()[name]), name
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")
    assert [line["step"] for line in read_log(tmp_path / "cut")] == [10, 20, 24]
    finished = make_trainer(store, tmp_path / "cut")
    assert finished.run(shows_progress=False).step == 24
    assert torch.equal(finished.head.slots, whole.head.slots)


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        (cut_file, {}, "is damaged .* delete .* to train from the start"),
        (lambda path: path.write_bytes(b"junk"), {}, "is damaged"),
        (lambda path: None, {"lr": 0.03}, r"other settings \(lr 0.02, now 0.03\)"),
        (lambda path: None, {"size": replace(SIZE, rows=3)}, r"other settings \(rows 4, now 3\)"),
    ],
)
def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused(
    store: AnswerStore, tmp_path: Path, spoil: Callable[[Path], object], changes: dict[str, Any], message: str
) -> None:
    make_trainer(store, tmp_path, steps=2).run(shows_progress=False)
    spoil(tmp_path / CHECKPOINT_FILE)
    with pytest.raises(StartupError, match=message):
        make_trainer(store, tmp_path, steps=2, **changes)


def test_a_loss_that_is_no_number_is_told(store: AnswerStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path)
    torch.nn.init.constant_(trainer.head.slots, float("nan"))
    with pytest.raises(StartupError, match="training diverged by step 10: the held-out loss is nan; lower the"):
        trainer.run(shows_progress=False)
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_every_slot_has_a_label(store: AnswerStore, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a slot without a label"):
        make_trainer(store, tmp_path, size=replace(SIZE, labels=SHAPE.num_slots - 1))


# ---- heads on disk

INFO = HeadInfo(shape=SHAPE, model="tiny", fingerprint="a" * 64, training={"steps": 3})


def test_a_head_is_read_as_it_was_kept(tmp_path: Path) -> None:
    head = make_head()
    save_head(tmp_path, head, INFO, torch.float32)
    found, info = load_head(tmp_path, INFO.fingerprint)
    assert info == INFO
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name])
    save_head(tmp_path, head, INFO)
    short, _ = load_head(tmp_path)
    assert torch.allclose(short.bias_to, head.bias_to, rtol=1e-2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.safetensors"]


def test_a_draft_vocabulary_is_kept_with_its_head(tmp_path: Path) -> None:
    ids = torch.arange(3, VOCAB, 4)
    shape = replace(SHAPE, draft_vocab_size=ids.numel())
    save_head(tmp_path, Head(shape, ids), replace(INFO, shape=shape))
    found, info = load_head(tmp_path)
    assert info.shape == shape
    assert torch.equal(found.draft_tokens, ids)
    for wrong in (ids.flip(0), ids + 30):
        save_head(tmp_path, Head(shape, wrong), replace(INFO, shape=shape))
        with pytest.raises(HeadError, match="draft_tokens must rise from 0 to at most 39"):
            load_head(tmp_path)


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / "head.json").read_text())
        value.update(changes)
        (folder / "head.json").write_text(json.dumps(value))

    return apply


def replace_weights(folder: Path) -> None:
    save_head(folder / "other", make_head(), replace(INFO, model="other"))
    (folder / "other" / "head.safetensors").replace(folder / "head.safetensors")


WIDER = {name: getattr(SHAPE, name) for name in HeadShape.__slots__} | {"ffn_size": 32}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "head.json").unlink(), r"head\.json: no such file"),
        (lambda folder: (folder / "head.safetensors").unlink(), r"head\.safetensors: no such file"),
        (lambda folder: cut_file(folder / "head.safetensors"), r"head\.safetensors is damaged"),
        (lambda folder: (folder / "head.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "head.json").write_text("[]"), "does not hold a JSON object"),
        (edit(format="x"), "format is 'x', this program reads 'foretoken-ctc-head'"),
        (edit(version=9), "version is 9, this program reads 1"),
        (edit(objective="ce"), "objective is 'ce', this program reads 'ctc'"),
        (edit(shape={"width": 3}), "shape must hold vocab_size"),
        (edit(shape={**WIDER, "width": -1}), "width must be a number from 1 to 65536, got -1"),
        (edit(shape={**WIDER, "window": 512}), "window must be a number from 1 to 511, got 512"),
        (edit(shape={**WIDER, "num_slots": 33}), "num_slots must be a number from 1 to 32, got 33"),
        (edit(shape={**WIDER, "num_heads": 3}), "width 16 does not part into 3 heads"),
        (edit(shape={**WIDER, "draft_vocab_size": 41}), "draft_vocab_size is 41, of 40 tokens"),
        (edit(shape=WIDER), r"layers\.0\.down\.weight has shape \(16, 16\), head\.json says \(16, 32\)"),
        (replace_weights, "are not of one head"),
    ],
)
def test_a_broken_head_is_refused_in_one_line(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    save_head(tmp_path, make_head(), INFO)
    spoil(tmp_path)
    with pytest.raises(FileError, match=message) as caught:
        load_head(tmp_path, INFO.fingerprint)
    assert "\n" not in str(caught.value)


def test_a_head_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_head(tmp_path, make_head(), INFO)
    with pytest.raises(HeadError, match=r"was trained for tiny \(aaaaaaaaaaaa\), not for mine \(bbbbbbbbbbbb\)"):
        load_head(tmp_path, "b" * 64, "mine")
