"""What the bench client prints: a table of medians, the ratios, one JSON line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.commands.bench_http import Answer


@dataclass(frozen=True, slots=True)
class Round:
    """All answers of one arm in one round."""

    concurrency: int
    arm: str
    number: int
    wall_s: float
    answers: tuple[Answer, ...]

    @property
    def good(self) -> list[Answer]:
        """The answers that ended well."""
        return [answer for answer in self.answers if not answer.error]

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the answers over the wall time of the round, prompts included in the time."""
        return sum(answer.num_completion for answer in self.good) / self.wall_s


def median(values: Sequence[float]) -> float | None:
    """The middle value; None of nothing."""
    return statistics.median(values) if values else None


def acceptance_length(answers: Sequence[Answer]) -> float | None:
    """Tokens won per verify step, the target's own one included, over all answers that report it."""
    records = [answer.speculation for answer in answers if answer.speculation is not None]
    num_steps = sum(record.num_spec_steps for record in records)
    if not num_steps:
        return None
    return 1.0 + sum(record.num_accepted_draft_tokens for record in records) / num_steps


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """One row of the table, from all rounds of one arm at one concurrency."""
    good = [answer for one in rounds for answer in one.good]
    ttft = median([answer.first_s for answer in good if answer.first_s])
    tpot = median([answer.tpot_s for answer in good if answer.tpot_s is not None])
    num_chunks = sum(answer.num_chunks for answer in good)
    return {
        "concurrency": rounds[0].concurrency,
        "arm": rounds[0].arm,
        "rounds": len(rounds),
        "requests": sum(len(one.answers) for one in rounds),
        "errors": sum(len(one.answers) - len(one.good) for one in rounds),
        "prompt_tokens": sum(answer.num_prompt for answer in good),
        "completion_tokens": sum(answer.num_completion for answer in good),
        "ttft_ms": None if ttft is None else round(ttft * 1e3, 3),
        "tpot_ms": None if tpot is None else round(tpot * 1e3, 4),
        "tokens_per_s": round(median([one.tokens_per_s for one in rounds]) or 0.0, 2),
        "acceptance_length": _rounded(acceptance_length(good), 4),
        "tokens_per_chunk": _rounded(sum(a.num_completion for a in good) / num_chunks if num_chunks else None, 3),
    }


def ratios(rounds: Sequence[Round], over: str, under: str) -> dict[str, Any]:
    """Tokens/s of arm `over` divided by that of arm `under`, round by round: median and all values."""
    by_arm = {arm: {one.number: one.tokens_per_s for one in rounds if one.arm == arm} for arm in (over, under)}
    pairs = [
        by_arm[over][number] / by_arm[under][number]
        for number in sorted(by_arm[over].keys() & by_arm[under].keys())
        if by_arm[under][number]
    ]
    return {"median": _rounded(median(pairs), 4), "rounds": [round(pair, 4) for pair in pairs]}


def same_texts(rounds: Sequence[Round]) -> tuple[int, int]:
    """(prompts with the same text in every arm, prompts compared), over the answers that ended well."""
    texts: dict[tuple[int, int, int], list[str]] = {}
    for one in rounds:
        for index, answer in enumerate(one.answers):
            if not answer.error:
                texts.setdefault((one.concurrency, one.number, index), []).append(answer.text)
    compared = [found for found in texts.values() if len(found) > 1]
    return sum(len(set(found)) == 1 for found in compared), len(compared)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, columns aligned."""
    columns = [
        ("concurrency", "concurrency", "{}"),
        ("arm", "arm", "{}"),
        ("requests", "requests", "{}"),
        ("errors", "errors", "{}"),
        ("ttft_ms", "TTFT ms", "{:.1f}"),
        ("tpot_ms", "TPOT ms", "{:.3f}"),
        ("tokens_per_s", "tokens/s", "{:.1f}"),
        ("acceptance_length", "acceptance length", "{:.2f}"),
    ]
    cells = [[title for _, title, _ in columns]]
    cells += [["-" if row[key] is None else form.format(row[key]) for key, _, form in columns] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def report(rounds: Sequence[Round], about: dict[str, Any], *, compare_texts: bool = True) -> tuple[str, dict[str, Any]]:
    """The text for a person, and the record behind its last line."""
    groups: dict[tuple[int, str], list[Round]] = {}
    for one in rounds:
        groups.setdefault((one.concurrency, one.arm), []).append(one)
    rows = [summarise(group) for _, group in sorted(groups.items(), key=lambda item: item[0])]
    arms = [arm for arm in ("on", "off", "plain") if any(one.arm == arm for one in rounds)]
    lines = [table(rows)]
    ratio: dict[str, Any] = {}
    if len(arms) > 1:
        for concurrency in sorted({one.concurrency for one in rounds}):
            found = ratios([one for one in rounds if one.concurrency == concurrency], arms[0], arms[1])
            ratio[str(concurrency)] = found
            if found["median"] is not None:
                lines.append(
                    f"{arms[0]} / {arms[1]} at concurrency {concurrency}: {found['median']:.2f}x tokens/s "
                    f"(median of {len(found['rounds'])} paired rounds, {min(found['rounds']):.2f} to "
                    f"{max(found['rounds']):.2f})"
                )
    same, compared = same_texts(rounds) if compare_texts else (0, 0)
    if compared:
        lines.append(f"same text in every arm: {same} of {compared} prompts")
    lines += _errors(rounds)
    record = {**about, "arms": arms, "results": rows, "ratio": ratio, "same_texts": same, "compared_texts": compared}
    return "\n".join(lines), record


def _errors(rounds: Sequence[Round]) -> list[str]:
    counts: dict[str, int] = {}
    for one in rounds:
        for answer in one.answers:
            if answer.error:
                counts[answer.error] = counts.get(answer.error, 0) + 1
    return [f"failed {count} times: {error}" for error, count in sorted(counts.items(), key=lambda item: -item[1])[:10]]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def to_json_line(record: dict[str, Any]) -> str:
    """One line, finite numbers only."""
    return json.dumps(record, allow_nan=False)
