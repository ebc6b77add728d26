"""The drafter as a whole: what it learns, from whom, for whom, and for how long."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.base import NOBODY, News, RowContext, Verified
from drafters.calibration import first_worth
from drafters.head import files
from drafters.ngram import state
from drafters.ngram.cache import extend_key
from drafters.ngram.source import Appetite, NgramFiles
from drafters.ngram.state import StateError, tenant_digest
from drafters.ngram.table import TableError
from tests.drafting import make_view, read, shape, tree
from training.ngram_table import BuildOptions, build_table
from verifier.cpu.noise import gumbel
from verifier.tree import DraftTrees, walk

VOCAB = 40
ALL = Appetite(0.9, committed_orders=(1, 2, 3, 4), verified_orders=(1, 2, 3, 4))
OPTIONS = {"REQUEST": ALL, "TENANT": ALL, "REQUEST_SLOTS": 512, "TENANT_SLOTS": 2048, "MAX_TENANTS": 3}
NOTHING = Appetite(0.9, committed_orders=(), verified_orders=())
NO_REQUEST = OPTIONS | {"REQUEST": NOTHING}
NO_TENANT = OPTIONS | {"TENANT": NOTHING}


def make(options=OPTIONS, **files):
    return make_view("trigram", VOCAB, files=NgramFiles(**files), **options)


def start(drafter, row, tokens, tenant="a", temperature=0.0, seed=1):
    drafter.start(row, RowContext(tenant, tuple(tokens), len(tokens), seed, temperature))


def children_of_root(drafter, row):
    tokens, parents, _ = shape(drafter, row)
    return [token for token, parent in zip(tokens, parents, strict=True) if parent == 0]


def verified(trees, candidates, logits=None):
    """The same candidates at every node."""
    tokens = np.tile(np.array(candidates, np.int32), (trees.num_nodes, 1))
    values = -2.0 * np.arange(len(candidates)) if logits is None else logits
    return Verified(trees, 0, tokens, np.tile(np.array(values, np.float32), (trees.num_nodes, 1)))


def test_a_repeated_passage_is_drafted_as_a_chain():
    drafter = make(NO_TENANT)
    start(drafter, 0, [5, 6, 7, 8, 9, 1, 2, 5])
    tokens, parents, _ = shape(drafter, 0, 6)
    assert tokens == [5, 6, 7, 8, 9, 1]
    assert parents == [-1, 0, 1, 2, 3, 4]


def test_committed_tokens_teach_request_and_tenant():
    for options in (NO_TENANT, NO_REQUEST):
        drafter = make(options)
        start(drafter, 0, [1])
        read(drafter, 0, [2, 3, 4])
        assert children_of_root(drafter, 0) == []
        read(drafter, 0, [1, 2, 3])
        assert children_of_root(drafter, 0) == [4]


def test_the_prompt_teaches_the_request_only():
    drafter = make()
    start(drafter, 0, [1, 2, 3, 9, 1, 2])
    assert children_of_root(drafter, 0)[0] == 3
    start(drafter, 1, [7, 1, 2])
    assert children_of_root(drafter, 1) == []


def test_candidates_at_rejected_nodes_are_learned():
    drafter = make(NO_REQUEST)
    start(drafter, 0, [1])
    read(drafter, 0, [2, 3, 1])
    read(drafter, 0, [2])
    trees = tree(drafter, 0)
    assert trees.tokens[1] == 3  # what will be rejected
    rejected = np.full((trees.num_nodes, 2), -1, np.int32)
    logits = np.full((trees.num_nodes, 2), np.nan, np.float32)
    rejected[1], logits[1] = [30, 31], [2.0, 1.0]
    shown = Verified(trees, 0, rejected, logits)
    news = News(np.array([0], np.int32), np.array([0, 1], np.int32), np.array([8]), shown)
    drafter.update(news)
    read(drafter, 0, [2, 3])
    found = children_of_root(drafter, 0)
    assert found[0] == 30
    assert 31 in found


def test_candidates_that_are_not_finite_teach_nothing():
    drafter = make()
    start(drafter, 0, [1, 2])
    trees = tree(drafter, 0)
    news = News(
        np.array([0], np.int32), np.array([0, 1], np.int32), np.array([2]),
        verified(trees, [5, 6], [np.inf, 0.0]),
    )  # fmt: skip
    drafter.update(news)
    assert children_of_root(drafter, 0) == [2]  # from the committed 2 2 alone


def test_news_outweighs_the_past():
    drafter = make(NO_REQUEST)
    start(drafter, 0, [1])
    for _ in range(30):
        read(drafter, 0, [2, 3, 4, 1])
    for _ in range(30):
        read(drafter, 0, [2, 3, 5, 1])
    read(drafter, 0, [2, 3])
    assert children_of_root(drafter, 0)[0] == 5


def test_layers_stay_within_their_bounds_and_keep_what_is_recent():
    drafter = make()
    start(drafter, 0, [0])
    random = np.random.default_rng(0)
    for _ in range(20):
        read(drafter, 0, random.integers(0, 36, 2000).tolist())
    ngram = drafter.drafter.ngram
    assert 0 < np.count_nonzero(ngram.request[0]["key"]) <= 512
    assert 512 < np.count_nonzero(ngram.tenant[ngram.tenants[tenant_digest("a")]]["key"]) <= 2048
    read(drafter, 0, [36, 37, 38, 39, 36, 37, 38, 39, 36, 37])
    assert children_of_root(drafter, 0)[0] == 38


TRAFFIC = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)), max_size=12
)


@settings(deadline=None, max_examples=40)
@given(TRAFFIC, TRAFFIC)
def test_no_tenant_sees_what_another_taught(own, foreign):
    """Promise 4: rows 0 and 1 are ours, 2 and 3 another's; only our own traffic shapes our trees."""

    def trees_of(traffic):
        drafter = make()
        for row in range(4):
            start(drafter, row, [row % 2], "ours" if row < 2 else "theirs")
        found = []
        for row, tokens in traffic:
            packed = tree(drafter, row)
            news = News(
                np.array([row], np.int32), np.array([0, len(tokens)], np.int32), np.array(tokens, np.int64),
                verified(packed, sorted({*tokens})[:5]),
            )  # fmt: skip
            drafter.update(news)
            drafter.drafter.memory.worth[:] = first_worth()  # counts without text, which tenants share
            if row < 2:
                found.append(shape(drafter, 0) + shape(drafter, 1))
        return found

    ours = [(row % 2, tokens) for row, tokens in own]
    theirs = [(2 + row % 2, tokens) for row, tokens in foreign]
    mixed = [item for pair in zip(ours, theirs, strict=False) for item in pair]
    mixed += ours[len(theirs) :] + theirs[len(ours) :]
    assert trees_of(mixed) == trees_of(ours)


def test_a_row_taken_by_another_tenant_starts_empty():
    drafter = make()
    start(drafter, 0, [1, 2, 3, 4, 1, 2, 3], "a")
    read(drafter, 0, [4, 1, 2])
    drafter.stop(0)
    start(drafter, 0, [2], "b")
    assert children_of_root(drafter, 0) == []
    start(drafter, 0, [1, 2], "a")
    assert children_of_root(drafter, 0) == []  # the tenant was taught contexts of two tokens and more: 4 1 -> 2


def test_nothing_of_a_request_outlives_it_without_a_tenant_layer():
    drafter = make(NO_TENANT)
    start(drafter, 0, [1, 2, 3, 1, 2, 3])
    drafter.stop(0)
    assert not drafter.drafter.ngram.request[0]["key"].any()
    start(drafter, 0, [1])
    assert children_of_root(drafter, 0) == []


@pytest.mark.parametrize("fault", ["its folder is a file", "No such file or directory", "Read-only file system"])
def test_a_place_that_cannot_keep_the_state_is_told_at_the_start(tmp_path, monkeypatch, fault):
    folder = tmp_path / "folder"
    if fault == "its folder is a file":
        folder.write_text("")
    elif fault == "No such file or directory":
        folder = Path("/proc/nowhere")
    else:

        def refuse(**_):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(state.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StateError, match=f"cannot keep the tri-gram state: {fault}"):
        keep(folder)


def test_a_place_for_the_state_is_tried_and_left_empty(tmp_path):
    keep(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


def test_idle_tenants_make_room_and_live_ones_do_not():
    drafter = make(NO_REQUEST)
    for row, tenant in enumerate(("a", "b", "c")):
        start(drafter, row, [1], tenant)
        read(drafter, row, [2, 3, 1, 2])
    start(drafter, 3, [1], "d")  # all layers belong to live rows
    read(drafter, 3, [2, 3, 1, 2])
    assert children_of_root(drafter, 3) == []
    drafter.stop(1)
    start(drafter, 1, [1, 2], "e")  # takes the layer of b, emptied
    assert children_of_root(drafter, 1) == []
    assert children_of_root(drafter, 0) == children_of_root(drafter, 2) == [3]
    assert {tenant_digest(name) for name in "ace"} == drafter.drafter.ngram.tenants.keys()


def test_a_trial_request_teaches_nothing_that_stays(tmp_path):
    drafter = keep(tmp_path)
    tenants = [f"t{index}" for index in range(OPTIONS["MAX_TENANTS"])]
    for tenant in tenants:
        start(drafter, 0, [1, 2], tenant)
        drafter.stop(0)
    start(drafter, 0, [1, 2], NOBODY)
    read(drafter, 0, [3, 1, 2])
    assert children_of_root(drafter, 0) == []
    drafter.stop(0)
    assert list(drafter.drafter.ngram.tenants) == [tenant_digest(tenant) for tenant in tenants]


def test_tokens_outside_the_vocabulary_are_never_proposed(tmp_path):
    options = BuildOptions(out=tmp_path / "t", tokenizer="wide")
    build_table(options, {"x": 99}, [[1, 2, 99, 1, 2, 98, 1, 2, 3]] * 3)
    drafter = make(table=str(tmp_path / "t"))
    start(drafter, 0, [1, 2])
    tokens = shape(drafter, 0)[0]
    assert 3 in tokens
    assert max(tokens) < VOCAB


def test_a_table_of_another_tokenizer_is_refused(tmp_path):
    options = BuildOptions(out=tmp_path / "t", tokenizer="other")
    build_table(options, {"x": 3}, [[1, 2, 3]])
    with pytest.raises(TableError, match="'other'"):
        make(table=str(tmp_path / "t"), fingerprint="ff")


def test_drafting_does_not_hold_the_interpreter(markov_table):
    drafter = make(table=markov_table)
    start(drafter, 0, [1, 2, 3])
    tree(drafter, 0)  # compiled before it is timed
    rows, sizes, trees = np.zeros(6000, np.int32), np.full(6000, 64, np.int32), DraftTrees.allocate(6000)
    thread = threading.Thread(target=drafter.propose, args=(rows, sizes, trees))
    began = time.perf_counter()
    thread.start()
    ticks = 0
    while thread.is_alive():
        time.sleep(0.001)
        ticks += 1
    spent = time.perf_counter() - began
    assert trees.num_nodes > 6000
    assert spent > 0.02, f"{spent} s is too short to tell"
    assert ticks > 5


class Markov:
    """A target whose next token depends on the last two, with its own candidates at every node."""

    def __init__(self, seed, temperature):
        self.logits = np.random.default_rng(seed).gumbel(0, 1.0, (VOCAB, VOCAB, VOCAB))
        self.temperature = temperature

    def choose(self, tokens, seed):
        logits = self.logits[tokens[-2], tokens[-1]]
        if self.temperature == 0:
            return int(logits.argmax())
        noise = [gumbel(np.uint64(seed), len(tokens), token) for token in range(VOCAB)]
        return int((logits / self.temperature + noise).argmax())

    def texts(self, count, length):
        for seed in range(1000, 1000 + count):
            tokens = [seed % VOCAB, seed % 7]
            while len(tokens) < length:
                tokens.append(self.choose(tokens, seed))
            yield tokens


def decode(drafter, target, told_temperature, max_nodes=8, length=120, requests=4):
    """Tokens per step, mean score and mean acceptance of the drafts, over the second half of the requests."""
    won = steps = nodes = accepted = score = 0.0
    for request in range(requests):
        tokens = [request, 3]
        start(drafter, 0, tokens, "a", told_temperature, request)
        while len(tokens) < length:
            trees = tree(drafter, 0, max_nodes)
            packed = trees.tokens[trees.span(0)].tolist()
            paths = [[]]
            for node in range(1, len(packed)):
                paths.append([*paths[trees.parents[node]], packed[node]])
            new, path = walk(trees, 0, lambda node, seen, known=tokens, at=request: target.choose([*known, *seen], at))
            states = [[*tokens, *below] for below in paths]
            logits = np.array([target.logits[known[-2], known[-1]] for known in states], np.float32)
            best = np.argsort(-logits, axis=1)[:, : drafter.num_candidates].astype(np.int32)
            shown = Verified(trees, 0, best, np.take_along_axis(logits, best, 1))
            drafter.update(News(np.array([0], np.int32), np.array([0, len(new)], np.int32), np.array(new), shown))
            tokens += new
            if request >= requests // 2:
                won, steps = won + len(new), steps + 1
                nodes, accepted = nodes + len(packed) - 1, accepted + len(path)
                score += float(trees.scores[trees.span(0)][1:].sum())
        drafter.stop(0)
    return won / steps, score / nodes, accepted / nodes


@pytest.fixture(scope="module")
def markov_table(tmp_path_factory):
    out = tmp_path_factory.mktemp("markov") / "t.tri"
    options = BuildOptions(out=out, tokenizer="markov")
    build_table(options, {"x": VOCAB - 1}, Markov(0, 1.0).texts(150, 120))
    return str(out)


def test_the_shared_noise_makes_drafts_better_and_scores_stay_honest(markov_table):
    target = Markov(0, 1.0)
    coupled = decode(make(table=markov_table), target, 1.0)
    blind = decode(make(table=markov_table), target, 0.0)
    assert coupled[0] > 1.2 * blind[0]
    assert 0.75 < coupled[1] / coupled[2] < 1.3


def test_learning_raises_acceptance_and_scores_stay_honest(markov_table):
    target = Markov(0, 0.0)
    static = decode(make(NO_REQUEST | {"TENANT": NOTHING}, table=markov_table), target, 0.0)
    adaptive = decode(make(table=markov_table), target, 0.0)
    assert adaptive[0] > 1.2 * static[0]
    # A target that two tokens determine is surer than any text: scores may be low, never promise too much.
    assert 0.5 < adaptive[1] / adaptive[2] < 1.1


def keep(tmp_path, fingerprint="ab" * 32, **changes):
    return make(NO_REQUEST | changes, state=str(tmp_path / "s"), fingerprint=fingerprint)


def taught(tmp_path):
    drafter = keep(tmp_path)
    for row, tenant in enumerate(("key-one", "key-two")):
        start(drafter, row, [1], tenant)
        read(drafter, row, [2, 3 + row, 1, 2])
    drafter.save()
    return drafter


def test_state_survives_a_restart_for_each_tenant_alone(tmp_path):
    before = taught(tmp_path)
    after = keep(tmp_path)
    for row, tenant in enumerate(("key-one", "key-two")):
        start(after, row, [1, 2], tenant)
        assert children_of_root(after, row) == children_of_root(before, row) == [3 + row]
    start(after, 2, [1, 2], "key-three")
    assert children_of_root(after, 2) == []
    content = (tmp_path / "s").read_bytes()
    assert b"key-one" not in content
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_fewer_layers_keep_the_tenants_used_last(tmp_path):
    taught(tmp_path)
    after = keep(tmp_path, MAX_TENANTS=1)
    assert after.drafter.ngram.tenants == {tenant_digest("key-two"): 0}
    start(after, 0, [1, 2], "key-two")
    assert children_of_root(after, 0) == [4]


def test_a_missing_state_is_a_first_start(tmp_path):
    drafter = keep(tmp_path)
    start(drafter, 0, [1, 2], "a")
    assert children_of_root(drafter, 0) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-9], "cut short"),
        (lambda content: content[:3], "not a tri-gram state"),
        (lambda content: b"X" + content[1:], "not a tri-gram state"),
        (lambda content: content[:8] + b"\x07" + content[9:], "version 7"),
        (lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:], "broken"),
    ],
)
def test_a_broken_state_is_refused(tmp_path, spoil, message):
    taught(tmp_path)
    (tmp_path / "s").write_bytes(spoil((tmp_path / "s").read_bytes()))
    with pytest.raises(StateError, match=message):
        keep(tmp_path)


def test_time_stamps_do_not_wrap_around(tmp_path):
    """The slot that was idle longest goes first, however long the server has run, and after a restart too."""
    tiny = {"TENANT": Appetite(0.9, (1,), ()), "TENANT_SLOTS": 4}
    drafter = keep(tmp_path, **tiny)
    start(drafter, 0, [0])
    drafter.drafter.ngram._tick = 2**32 - 4
    for token in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        read(drafter, 0, [token])
        known = set(held_contexts(drafter))
        # What was read last followed the token before it: the four youngest contexts are held.
        assert known >= {extend_key(np.uint64(0), last) for last in range(max(0, token - 4), token)}
    drafter.save()
    again = keep(tmp_path, **tiny)
    again.drafter.ngram._tick = 2**31 - 1
    start(again, 0, [9])
    for token in (10, 11, 12, 13):
        read(again, 0, [token])
    assert set(held_contexts(again)) == {extend_key(np.uint64(0), last) for last in (9, 10, 11, 12)}


def held_contexts(drafter):
    return drafter.drafter.ngram.tenant[0]["key"].tolist()


def test_a_state_of_another_tokenizer_or_size_is_refused(tmp_path):
    taught(tmp_path)
    with pytest.raises(StateError, match="another tokenizer"):
        keep(tmp_path, fingerprint="cd" * 32)
    with pytest.raises(StateError, match="caches of 2048 contexts, not 64"):
        keep(tmp_path, TENANT_SLOTS=64)


def test_a_failed_save_keeps_the_old_state(tmp_path, monkeypatch):
    drafter = taught(tmp_path)
    content = (tmp_path / "s").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    read(drafter, 0, [5])
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StateError, match=r"cannot keep .*No space left on device"):
        drafter.save()
    monkeypatch.undo()
    assert (tmp_path / "s").read_bytes() == content
    assert os.listdir(tmp_path) == ["s"]
