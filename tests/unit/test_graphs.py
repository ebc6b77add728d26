"""Which step sizes are recorded, in which order, and which one serves a step."""

from __future__ import annotations

import logging

import pytest

from verifier.cuda import graphs
from verifier.cuda.graphs import Bucket, Graphs, Recording, bucket_of, is_first, ladder


def nothing() -> None:
    return None


class Maker:
    """Owns the list of what was recorded."""

    def __init__(self) -> None:
        self.made: list[Bucket] = []
        self.most = 1000

    def make(self, bucket: Bucket) -> Recording:
        self.made.append(bucket)
        return Recording(bucket, nothing, nothing, nothing)

    def graphs(self, max_rows: int = 64, max_positions: int = 2048) -> Graphs:
        return Graphs(self.make, lambda: len(self.made) < self.most, (max_rows, max_positions))


@pytest.mark.parametrize(
    ("step", "bucket"),
    [
        ((1, 1, 1), Bucket(1, 1, 1)),
        ((3, 1, 3), Bucket(4, 1, 4)),
        ((33, 3, 33), Bucket(48, 4, 48)),
        ((40, 40, 40), Bucket(48, 64, 48)),
        ((8, 5, 5), Bucket(8, 8, 8)),
        ((70, 5, 5), Bucket(96, 8, 8)),  # a prompt beside plain decoding: logits for the rows alone
        ((70, 5, 20), Bucket(96, 8, 96)),
        ((512, 1, 0), Bucket(512, 1, 1)),
        ((513, 1, 1), None),
    ],
)
def test_a_step_is_padded_to_its_bucket(step: tuple[int, int, int], bucket: Bucket | None) -> None:
    found = bucket_of(*step)
    assert found == bucket
    if found is not None:
        assert found.size_class[0] >= found.num_positions >= step[0]
        assert found.num_segments >= step[1]
        assert found.num_positions >= found.num_logits >= step[2]


@pytest.mark.parametrize(("max_rows", "most"), [(1, 64), (6, 48), (64, 512)])
def test_the_ladder_holds_every_step_of_trees_once(max_rows: int, most: int) -> None:
    buckets = list(ladder(max_rows, most))
    assert len(set(buckets)) == len(buckets)
    for num_rows in range(1, max_rows + 1):
        for num_nodes in range(num_rows, min(64 * num_rows, most) + 1):
            bucket = bucket_of(num_nodes, num_rows, num_nodes, most)
            assert any(one.holds(bucket) and one.num_positions == bucket.num_positions for one in buckets if bucket)
    firsts = [is_first(bucket) for bucket in buckets]
    assert firsts == sorted(firsts, reverse=True)
    assert buckets[0] == Bucket(1, 1, 1)


def test_the_first_ones_come_before_readiness_and_the_missed_ones_next() -> None:
    maker = Maker()
    recorded = maker.graphs()
    recorded.prepare_first()
    assert maker.made == [bucket for bucket in ladder(64, 512) if is_first(bucket)]
    assert 10 < len(maker.made) < 20
    assert recorded.find(100, 3, 100) is None
    assert recorded.find(300, 1, 1) is None
    count = len(maker.made)
    assert recorded.prepare_more(is_idle=True)
    assert recorded.prepare_more(is_idle=True)
    assert maker.made[count:] == [Bucket(128, 4, 128), Bucket(384, 1, 1)]
    while recorded.prepare_more(is_idle=True):
        pass
    assert set(maker.made) == {*ladder(64, 512), Bucket(384, 1, 1)}
    assert len(set(maker.made)) == len(maker.made)
    assert not recorded.prepare_more(is_idle=True)
    found = recorded.find(100, 3, 100)
    assert found is not None
    assert found.bucket == Bucket(128, 4, 128)


def test_a_larger_one_helps_out_if_it_is_not_much_larger() -> None:
    maker = Maker()
    recorded = maker.graphs()
    recorded.prepare_first()
    found = recorded.find(20, 3, 20)
    assert found is not None
    assert found.bucket == Bucket(32, 8, 32)
    assert recorded.find(2, 1, 2) is not None
    assert recorded.find(100, 3, 100) is None
    recorded._missed.popitem()
    assert recorded.prepare_more(is_idle=True)
    assert maker.made[-1] == Bucket(32, 4, 32), "its own is recorded nevertheless"


def test_while_requests_run_only_what_they_miss_is_recorded_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(graphs, "perf_counter", lambda: now[0])
    maker = Maker()
    recorded = maker.graphs()

    def make_slowly(bucket: Bucket) -> Recording:
        now[0] += 1.0
        return Maker.make(maker, bucket)

    recorded._make = make_slowly
    recorded.prepare_more(is_idle=False)
    assert not maker.made
    recorded.find(2, 2, 2)
    recorded.find(3, 3, 3)
    recorded.prepare_more(is_idle=False)
    recorded.prepare_more(is_idle=False)
    assert maker.made == [Bucket(2, 2, 2)]
    now[0] += 20.1
    recorded.prepare_more(is_idle=False)
    assert maker.made == [Bucket(2, 2, 2), Bucket(4, 4, 4)]


def test_readiness_waits_for_plain_decoding_of_all_rows() -> None:
    for max_rows in (1, 5, 64, 256):
        recorded = Maker().graphs(max_rows)
        recorded.prepare_first()
        for num_rows in range(1, max_rows + 1):
            found = recorded.find(num_rows, num_rows, num_rows)
            assert found is not None
            assert found.bucket == bucket_of(num_rows, num_rows, num_rows)


def test_a_size_that_cannot_be_recorded_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker()
    recorded = maker.graphs()
    broken = {Bucket(2, 2, 2), Bucket(8, 8, 8)}

    def make(bucket: Bucket) -> Recording:
        if bucket in broken:
            raise RuntimeError("CUDA error: not while capturing\nand a trace")
        return Maker.make(maker, bucket)

    recorded._make = make
    recorded.prepare_first()
    assert recorded.find(2, 2, 2) is not None, "a larger one serves it"
    while recorded.prepare_more(is_idle=True):
        pass
    assert set(recorded.buckets) == {*ladder(64, 512)} - broken
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    assert caplog.records[0].message == "steps of 2 positions could not be recorded: CUDA error: not while capturing"


def test_after_three_that_fail_no_more_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    recorded = Maker().graphs()

    def make(bucket: Bucket) -> Recording:
        raise RuntimeError("no")

    recorded._make = make
    recorded.prepare_first()
    assert not recorded.prepare_more(is_idle=True)
    assert recorded.find(1, 1, 1) is None
    assert not recorded.prepare_more(is_idle=True)
    assert len(caplog.records) == 3


def test_where_memory_ends_recording_does(caplog: pytest.LogCaptureFixture) -> None:
    maker = Maker()
    maker.most = 3
    recorded = maker.graphs()
    with caplog.at_level(logging.INFO, logger="verifier.cuda.graphs"):
        recorded.prepare_first()
    assert len(recorded.buckets) == 3
    assert [record.message for record in caplog.records] == ["3 step sizes are recorded; there is no memory for more"]
    assert recorded.find(1, 1, 1) is not None
    assert recorded.find(64, 1, 64) is None
    assert not recorded.prepare_more(is_idle=True)


def test_no_bucket_is_larger_than_a_step_can_be() -> None:
    recorded = Maker().graphs(2, 20)
    while recorded.prepare_more(is_idle=True):
        pass
    assert max(bucket.num_positions for bucket in recorded.buckets) == 32
    assert max(bucket.num_segments for bucket in recorded.buckets) == 2


@pytest.mark.parametrize(("step", "is_served"), [((96, 1, 1), True), ((70, 1, 70), False), ((70, 2, 1), False)])
def test_a_larger_recording_helps_out_only_where_all_of_the_step_fits(
    step: tuple[int, int, int], is_served: bool
) -> None:
    """A recording of a prompt's end has logits for one place, and none for the nodes of a tree."""
    maker = Maker()
    recorded = maker.graphs()
    recorded.find(128, 1, 1)
    recorded.prepare_more(is_idle=True)
    assert maker.made == [Bucket(128, 1, 1)]
    assert (recorded.find(*step) is not None) == is_served
