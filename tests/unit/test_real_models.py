"""The bench on real models: whose prompts are asked where, what its figures mean, one tiny run without a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server import demo
from server.commands.bench_http import Answer, SpeculativeDecoding
from server.commands.bench_prompts import Prompt
from server.config import Settings
from tests.bench import real_http, real_models
from tests.bench.real_http import OFF, ON, ArmRound, differences, pooled, shares_of
from tests.bench.real_prompts import TASKS, Question, deal, read_tasks, rounds_of, shaper, without_repeats
from tests.bench.real_replay import Asking, Target, Written, masks_of, num_different, replay_cell
from tests.bench.real_report import against_best, grid, is_looping, ratio
from tests.bench.serving import Turn

TEXTS = {"chat": [f"chat {index}" for index in range(12)], "qa": [f"qa {index}" for index in range(9)]}
SHAPE = shaper((), 0)


def texts_of(questions: list[Question]) -> list[str]:
    return [question.prompt.messages[0][1] for question in questions]


# ---- prompts


def test_no_prompt_is_dealt_twice_and_the_seed_fixes_the_deal() -> None:
    groups = deal(TEXTS, 8, 1, SHAPE)
    asked = [text for group in groups for text in texts_of(group)]
    assert len(set(asked)) == len(asked) == 16
    assert all([question.task for question in group] == ["chat", "qa"] for group in groups)
    assert deal(TEXTS, 8, 1, SHAPE) == groups
    assert deal(TEXTS, 5, 1, SHAPE) == groups[:5], "more prompts must not change the first ones"
    assert deal(TEXTS, 8, 2, SHAPE) != groups


def test_rounds_share_no_prompt_and_leave_none_out() -> None:
    groups = deal(TEXTS, 8, 1, SHAPE)
    rounds = rounds_of(groups, 3)
    assert sorted(map(len, rounds)) == [4, 6, 6]
    assert sorted(text for one in rounds for text in texts_of(one)) == sorted(
        text for group in groups for text in texts_of(group)
    )
    with pytest.raises(SystemExit, match="--rounds 9"):
        rounds_of(groups, 9)


def test_too_few_prompts_of_a_task_are_told() -> None:
    with pytest.raises(SystemExit, match="--tasks qa: 9 prompts, 10 are needed"):
        deal(TEXTS, 10, 1, SHAPE)


def test_what_two_tasks_have_in_common_is_asked_in_the_first_only() -> None:
    assert without_repeats({"a": ["one two", "three"], "b": ["one  two ", "four", "four"]}) == {
        "a": ["one two", "three"],
        "b": ["four"],
    }


def test_tasks_are_read_from_their_files(tmp_path: Path) -> None:
    rows = [("writing", "w"), ("stem", "s"), ("qa", "q"), ("math_reasoning", "How  many?")]
    folders = [tmp_path / name for name in ("spec_bench", "humaneval", "gsm8k")]
    for folder in folders:
        folder.mkdir()
    lines = [json.dumps({"category": category, "turns": [text, "second turn"]}) for category, text in rows]
    (folders[0] / "question.jsonl").write_text("\n".join(lines))
    (folders[1] / "HumanEval.jsonl").write_text(json.dumps({"prompt": "def f():"}))
    (folders[2] / "test.jsonl").write_text("\n".join(json.dumps({"question": text}) for text in ("How many?", "New?")))
    found = read_tasks(folders[0], TASKS)
    assert found["chat"] == ["w", "s"]
    assert found["humaneval"] == ["def f():"]
    assert found["gsm8k"] == ["New?"], "a question of Spec-Bench's mathematics was asked before"
    assert list(read_tasks(folders[0], ["qa"])) == ["qa"]
    (folders[2] / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"--prompts: .*test\.jsonl: No such file"):
        read_tasks(folders[0], TASKS)


def test_prompts_are_shaped_by_task() -> None:
    shape = shaper(["humaneval"], 5)
    assert shape("humaneval", "def f():") == Prompt((), "def f")
    assert shape("qa", "Who is it?") == Prompt((("user", "Who i"),), "")


# ---- arithmetic


def test_an_answer_loops_if_more_than_three_tenths_of_its_8_grams_are_repeated() -> None:
    assert not is_looping(range(100))
    assert not is_looping([1, 2, 3, 4, 5, 6, 7])
    assert is_looping([1, 2, 3] * 20)
    # 20 different 8-grams and, behind a break of 8 new ones, n repeated ones: n / (27 + n)
    start = list(range(20))
    assert not is_looping([*start, 99, *start[:16]])  # 9 of 30 are repeated
    assert is_looping([*start, 99, *start[:18]])  # 11 of 32


def test_a_ratio_is_the_median_over_paired_rounds() -> None:
    found = ratio([20.0, 30.0, 10.0], [10.0, 10.0, 10.0])
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert str(found) == "2.00 (1.00 to 3.00)"
    with pytest.raises(ValueError, match="argument 2"):
        ratio([1.0, 2.0], [1.0])


def test_an_arm_is_compared_with_the_best_of_the_others() -> None:
    steady = {"speculator": [20.0, 22.0, 18.0, 20.0], "off": [10.0] * 4, "16 nodes": [20.0, 22.0, 18.0, 20.0]}
    found = against_best(steady, "speculator")
    assert found.best == "16 nodes"
    assert (found.ratio.median, found.ratio.low, found.ratio.high) == (1.0, 1.0, 1.0)
    noisy = steady | {"speculator": [10.0, 30.0, 12.0, 40.0]}
    found = against_best(noisy, "speculator")
    assert found.ratio.low < found.ratio.median < found.ratio.high
    assert found == against_best(noisy, "speculator"), "the resampling has a seed"
    assert (found.ratio.low, found.ratio.high) == (0.5, 2.0), "of four rounds the extremes are within 95 %"


def test_tables_are_aligned() -> None:
    assert grid(["c", "arm"], [["1", "off"], ["16", "on"]]) == "| c  | arm |\n| -- | --- |\n| 1  | off |\n| 16 | on  |"


# ---- over HTTP


def answer(text: str, num_tokens: int, last_s: float, accepted: int = 0, steps: int = 0) -> Answer:
    spoken = SpeculativeDecoding(steps, accepted, 4 * steps) if steps else None
    return Answer(text=text, num_completion=num_tokens, last_s=last_s, speculation=spoken)


def record(arm: str, round_: int, wall_s: float, *answers: Answer) -> ArmRound:
    questions = [Question(task, SHAPE(task, "?")) for task in ("chat", "qa")]
    drafted = {"trigram": 30.0, "ctc": 10.0, "other": 0.0} if arm == ON else {}
    return ArmRound(arm, 1, round_, questions, Turn(answers, wall_s), drafted, 0.0)


RECORDS = [
    record(OFF, 0, 2.0, answer("same", 10, 1.0), answer("text", 10, 1.0)),
    record(ON, 0, 1.0, answer("same", 10, 0.4, 6, 2), answer("text", 10, 0.6, 3, 2)),
    record(ON, 1, 1.0, answer("same", 10, 0.5, 6, 3), answer("tent", 10, 0.5, 3, 6)),
    record(OFF, 1, 3.0, answer("same", 10, 1.0), answer("text", 10, 2.0)),
]


def test_speed_is_of_the_wall_clock_for_all_and_of_the_answers_times_for_a_task() -> None:
    assert RECORDS[0].speed("all") == 10.0
    assert RECORDS[1].speed("chat") == 25.0
    off = [one for one in RECORDS if one.arm == OFF]
    assert pooled(off, "all") == 8.0
    assert pooled(off, "qa") == pytest.approx(20 / 3)


def test_differing_texts_are_counted_and_placed() -> None:
    assert differences(RECORDS) == (["c=1 round 2 qa: from character 2"], 4)


def test_the_report_has_a_row_for_each_task_and_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    found = real_http.report(RECORDS, ["chat", "qa"])
    row = found["on_off"][1]["all"]
    assert row["rounds"] == [2.5, 2.0, 3.0]
    assert row["ratio"] == 2.5
    assert row["acceptance_length"] == pytest.approx(1 + 18 / 13, abs=1e-3)
    assert row["drafting_share"] == pytest.approx(13 / 18, abs=1e-3)  # 4 x 9 tokens, 18 of them drafted
    assert found["on_off"][1]["chat"]["rounds"] == [2.25, 2.0, 2.5]
    assert found["sources"][1] == shares_of(RECORDS) == {"trigram": 0.75, "ctc": 0.25}
    printed = capsys.readouterr().out
    assert "2.50 (2.00 to 3.00)" in printed
    assert "drafted at c=1: trigram 75%, ctc 25%" in printed


# ---- in process


def test_a_head_makes_more_masks() -> None:
    options = real_models.parser().parse_args(["replay"])
    assert masks_of(Settings(), options.masks) == ["trigram", "suffix", "hybrid"]
    assert len(masks_of(Settings(ctc_head="x"), options.masks)) == 5


def test_words_behind_the_bar_are_those_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORETOKEN_MODEL", raising=False)
    settings = real_models.settings_of(["folder", "--max-nodes", "8"])
    assert (settings.model, settings.max_nodes, settings.ctc_head) == ("folder", 8, "")
    assert real_models.settings_of([]).model, "without a model there is the default one"


def test_the_first_token_of_an_answer_costs_no_step() -> None:
    assert Written("qa", [1, 2, 3, 4], 3).won == (3, 2)


def test_replay_counts_what_drafts_win_and_leaves_the_texts_alone() -> None:
    settings = Settings(model=str(demo.MODEL), eager=True, compile=False, threads=1, kv_cache_gib=0.125)
    target = Target(settings, max_rows=2, max_nodes=8)
    texts = {"chat": ["I want to book a table.", "A flight to Rome, please."], "qa": ["What is the weather like?"] * 2}
    questions = [question for group in deal(texts, 2, 1, SHAPE) for question in group]
    asking = Asking(max_tokens=12)
    plain = replay_cell(target, questions, asking, ("suffix", 1, 2))
    cell = replay_cell(target, questions, asking, ("trigram", 8, 2))
    assert [one.task for one in cell.answers] == ["chat", "qa", "chat", "qa"]
    assert num_different([plain, cell]) == 0
    assert plain.lengths(True) == {"chat": 1.0, "qa": 1.0, "all": 1.0}
    lengths = cell.lengths(True)
    assert (lengths["qa"] or 0.0) > 1.5, "the second time it is the same question"
    num_own = sum(steps for _, steps in (answer.won for answer in cell.answers))  # the target's, one a step
    surplus = sum(cell.counts.accepted) + num_own - sum(won for won, _ in (answer.won for answer in cell.answers))
    assert 0 <= surplus <= 4, "but where an accepted draft ends the answer"
    cell.answers[3].tokens[2] += 1
    assert num_different([plain, cell]) == 1
