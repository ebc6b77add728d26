"""Replaying recorded answers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from drafters.base import Drafter
from tests.bench import simulate
from tests.bench.simulate import Recording, RecordingError, read_recordings
from tests.drafting import PlainDecoding, make_view

LOOP = Recording(prompt=(1, 2, 3, 4, 1), answer=(2, 3, 4, 1) * 5)


class Parrot(Drafter):
    """Proposes the true next tokens, and keeps all it is told."""

    num_candidates = 2

    def __init__(self, answer, wrong=99):
        self.max_depth = 8
        self.answer, self.wrong = answer, wrong
        self.at, self.news = {}, []

    def start(self, row, context):
        self.at[row] = 0

    def update(self, news):
        self.news.append(news)
        for index, row in enumerate(news.rows.tolist()):
            self.at[row] += int(news.starts[index + 1] - news.starts[index])

    def propose(self, rows, max_nodes, out):
        for row, count in zip(rows.tolist(), max_nodes.tolist(), strict=True):
            won = self.at[row]
            chain = [self.answer[won - 1], *self.answer[won : won + count - 2]]
            tokens = [*chain, self.wrong]
            out.append(tokens, [-1, *range(len(chain) - 1), 0], [1.0] + [0.5] * len(chain), [0] * len(tokens))


@pytest.mark.parametrize("batch", [1, 3])
def test_plain_decoding_wins_one_token_a_step(batch):
    result = simulate.simulate(PlainDecoding(), [LOOP, replace(LOOP, answer=(5,)), LOOP], 8, batch)
    assert (result.num_answers, result.num_tokens, result.num_steps, result.num_nodes) == (2, 38, 38, 0)
    assert result.acceptance_length == 1.0


def test_true_drafts_are_won_and_counted():
    answer = tuple(range(10, 31))
    result = simulate.simulate(Parrot(answer), [Recording(prompt=(1,), answer=answer)], 6)
    assert result.num_steps == 4  # 20 tokens after the first, 4 drafted and one of the target's own at a time
    assert result.acceptance_length == 5.0
    assert result.num_nodes == 4 * 5
    assert result.mean_score == 0.5
    assert result.mean_acceptance == pytest.approx(16 / 20)
    assert result.propose_us > 0
    assert result.read_us > 0


def test_recorded_candidates_reach_the_nodes_of_the_true_path_only():
    answer = tuple(range(10, 18))
    recording = Recording(
        prompt=(1,),
        answer=answer,
        candidates=tuple((token, token + 50, 7) for token in answer),
        logits=tuple((float(token), 1.0, 0.0) for token in answer),
    )
    parrot = Parrot(answer)
    simulate.simulate(parrot, [recording], 4)
    verified = parrot.news[1].verified
    # Root, two true nodes, one wrong one. The root stands at answer[0] and predicts answer[1].
    assert verified.candidates[:3].tolist() == [[11, 61], [12, 62], [13, 63]]
    assert verified.logits[:3, 0].tolist() == [11.0, 12.0, 13.0]
    assert np.isnan(verified.logits[3]).all()


def test_the_tri_gram_drafter_learns_a_loop():
    assert simulate.simulate(make_view("trigram", 100), [LOOP] * 4, 5, batch=2).acceptance_length > 4


def write(tmp_path, *rows):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_recordings_are_read_from_a_file(tmp_path):
    row = {"prompt": [1], "answer": [2, 3], "candidates": [[2], [3]], "logits": [[1], [2]], "tenant": "t", "seed": 4}
    found = list(read_recordings(write(tmp_path, row, "", {"prompt": [1], "answer": []})))
    assert found[0] == Recording(
        prompt=(1,), answer=(2, 3), candidates=((2,), (3,)), logits=((1.0,), (2.0,)), tenant="t", seed=4
    )
    assert found[1] == Recording(prompt=(1,), answer=())


@pytest.mark.parametrize(
    "row",
    [
        "{",
        {"prompt": [1]},
        {"prompt": [], "answer": [1]},
        {"prompt": [1], "answer": ["x"]},
        {"prompt": [1], "answer": [1, 2], "candidates": [[1]], "logits": [[1]]},
        {"prompt": [1], "answer": [1, 2], "candidates": [[1], [1, 2]], "logits": [[1], [1]]},
    ],
)
def test_a_broken_line_is_named(tmp_path, row):
    with pytest.raises(RecordingError, match=r"r\.jsonl:2: "):
        list(read_recordings(write(tmp_path, {"prompt": [1], "answer": [1]}, row)))


def test_command_line_prints_a_table_and_one_json_line(tmp_path, capsys):
    path = write(tmp_path, {"prompt": list(LOOP.prompt), "answer": list(LOOP.answer)})
    assert simulate.main([str(path), "--max-nodes", "5", "--drafter", "trigram"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["num_answers", "1"]
    assert json.loads(lines[-1])["acceptance_length"] > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--max-nodes", "65"], "1 to 64"), (["--table", "none.tri"], "none.tri: cannot read"), ([], "no recordings")],
)
def test_command_line_refuses_in_one_line(tmp_path, capsys, arguments, message):
    path = write(tmp_path, {"prompt": [1], "answer": [2, 3]}) if arguments else write(tmp_path, "")
    with pytest.raises(SystemExit) as caught:
        simulate.main([str(path), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
