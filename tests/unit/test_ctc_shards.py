from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafters.base import HiddenStates, News, RowContext
from drafters.head import files
from drafters.head.files import FileError, write_whole
from server.errors import StartupError
from training.answer_store import MAX_SHARD_BYTES, AnswerStore, DataPlan, Record
from training.answer_writer import StateRecorder

HIDDEN = 16


def make_plan(**changes: Any) -> DataPlan:
    fields = {"fingerprint": "f", "corpus": "c", "num_answers": 300, "max_tokens": 8, "window": 4, "seed": 0}
    return DataPlan(**{"hidden_size": HIDDEN, "max_model_len": 64, **fields, **changes})


def make_record(number: int, num_states: int = 5) -> Record:
    stream = np.random.default_rng(number)
    return Record(
        tokens=stream.integers(0, 90, num_states + 1).astype(np.int32),
        states=stream.normal(size=(num_states, HIDDEN)).astype(np.float16),
        first=number,
        num_answer=3,
        temperature=0.5,
        document=number // 2,
    )


def assert_same(found: Record, expected: Record) -> None:
    assert np.array_equal(found.tokens, expected.tokens)
    assert np.array_equal(found.states, expected.states)
    assert (found.first, found.num_answer, found.document) == (expected.first, expected.num_answer, expected.document)
    assert found.temperature == expected.temperature


def test_what_is_put_is_read_again_by_a_later_run(tmp_path: Path) -> None:
    records = [make_record(number, 3 + number % 4) for number in range(7)]
    AnswerStore(tmp_path, make_plan()).put(0, records)
    store = AnswerStore(tmp_path, make_plan())
    assert sorted(store.shards) == [0]
    assert store.damaged == []
    stored = store.shards[0]
    assert len(stored.documents) == 7
    for index in (6, 0, 3):
        assert_same(stored.record(index), records[index])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    sizes = {"bytes": store.path(0).stat().st_size, "records": 7, "states": sum(len(one.states) for one in records)}
    assert manifest["shards"] == {"0": sizes}


def test_a_shard_without_records_is_whole(tmp_path: Path) -> None:
    AnswerStore(tmp_path, make_plan()).put(1, [])
    assert sorted(AnswerStore(tmp_path, make_plan()).shards) == [1]


def test_a_kill_between_a_shard_and_the_manifest_loses_nothing(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, make_plan())
    store.put(0, [make_record(0)])
    before = (tmp_path / "manifest.json").read_text()
    store.put(1, [make_record(1)])
    after = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(before)
    again = AnswerStore(tmp_path, make_plan())
    assert sorted(again.shards) == [0, 1]
    again.put(1, [make_record(1)])
    assert (tmp_path / "manifest.json").read_text() == after
    (tmp_path / "manifest.json").unlink()
    assert sorted(AnswerStore(tmp_path, make_plan()).shards) == [0, 1]
    store.path(0).unlink()
    assert sorted(AnswerStore(tmp_path, make_plan()).shards) == [1]


def test_shards_are_bounded_however_wide_the_states() -> None:
    for hidden_size in (16, 4096, 16384):
        plan = make_plan(hidden_size=hidden_size, max_tokens=256, window=64, num_answers=10_000)
        assert plan.answers_per_shard * plan.record_bytes <= MAX_SHARD_BYTES or plan.answers_per_shard == 1
        numbers = [number for shard in range(plan.num_shards) for number in plan.answers(shard)]
        assert numbers == list(range(10_000))


@pytest.mark.parametrize("damage", ["cut", "foreign", "other plan"])
def test_a_damaged_shard_is_told_in_one_line_and_made_again(tmp_path: Path, damage: str) -> None:
    store = AnswerStore(tmp_path, make_plan())
    store.put(0, [make_record(0)])
    store.put(1, [make_record(1)])
    path = store.path(1)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "foreign":
        path.write_bytes(b"something else altogether")
    else:
        other = AnswerStore(tmp_path / "other", make_plan(seed=1))
        other.put(1, [make_record(1)])
        path.write_bytes(other.path(1).read_bytes())
    again = AnswerStore(tmp_path, make_plan())
    assert sorted(again.shards) == [0]
    (line,) = again.damaged
    assert str(path) in line
    assert line.endswith("it is made again")
    assert "\n" not in line
    again.put(1, [make_record(5)])
    assert_same(AnswerStore(tmp_path, make_plan()).shards[1].record(0), make_record(5))


def test_the_data_of_another_plan_are_refused_and_stay(tmp_path: Path) -> None:
    AnswerStore(tmp_path, make_plan()).put(0, [make_record(0)])
    with pytest.raises(StartupError, match=r"holds the data of another run \(max_tokens 8, now 9\)"):
        AnswerStore(tmp_path, make_plan(max_tokens=9))
    with pytest.raises(StartupError, match=r"holds the data of another run \(max_model_len 64, now 4096\)"):
        AnswerStore(tmp_path, make_plan(max_model_len=4096))
    assert sorted(AnswerStore(tmp_path, make_plan()).shards) == [0]
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StartupError, match="not JSON"):
        AnswerStore(tmp_path, make_plan())


def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(tmp_path, make_plan())
    store.put(0, [make_record(0)])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(StartupError, match=r"No space left on device; 1 finished shards stay"):
            store.put(1, [make_record(1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert sorted(AnswerStore(tmp_path, make_plan()).shards) == [0]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(FileError, match="Input/output error"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# ---- the recorder


def context(num_prompt: int, num_answer: int = 0, seed: int = 3) -> RowContext:
    return RowContext("t", tuple(range(num_prompt + num_answer)), num_prompt, seed, 0.0)


def tell(recorder: StateRecorder, row: int, first: int, count: int, scale: float = 1.0) -> None:
    """States at positions first .. first + count - 1, each filled with its position."""
    states = (torch.arange(first, first + count).float() * scale)[:, None].expand(-1, HIDDEN)
    nothing = np.zeros(0, np.int32)
    hidden = HiddenStates(np.array([row], np.int32), np.array([0, count], np.int32), np.array([first]), states)
    recorder.update(News(nothing, np.zeros(1, np.int32), nothing.astype(np.int64), None, hidden))


def places(taken: tuple[int, Any] | None) -> list[int]:
    assert taken is not None
    first, states = taken
    assert states.dtype == np.float16
    assert states[:, 0].tolist() == list(range(first, first + states.shape[0]))
    return [first, states.shape[0]]


def test_states_of_one_answer_are_joined_and_taken_once() -> None:
    recorder = StateRecorder(4)
    recorder.start(2, context(6))
    for first, count in ((2, 4), (6, 1), (7, 3)):
        tell(recorder, 2, first, count)
    assert places(recorder.take(3)) == [2, 8]
    assert recorder.take(3) is None


def test_a_gap_begins_anew_and_a_preempted_answer_goes_on() -> None:
    recorder = StateRecorder(4)
    recorder.start(0, context(20))
    tell(recorder, 0, 2, 4)
    tell(recorder, 0, 16, 4)  # positions 6 to 15 never came
    tell(recorder, 0, 20, 2)
    recorder.stop(0)
    recorder.start(1, context(20, 3))
    tell(recorder, 1, 18, 5)  # computed again, four of them known
    assert places(recorder.take(3)) == [16, 7]


def test_states_too_large_for_the_type_stay_finite() -> None:
    recorder = StateRecorder(4)
    recorder.start(0, context(2))
    tell(recorder, 0, 1, 2, 1e6)
    taken = recorder.take(3)
    assert taken is not None
    assert np.isfinite(taken[1]).all()
