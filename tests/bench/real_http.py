"""tokens/s over HTTP on real models: speculation off and on, and llama.cpp's server beside them, turn by turn.

A server learns from what a tenant asks, so each arm of ours has an API key of its own, and so a tenant of its own: the
same prompt can be asked in both arms, and is new to each. Both run in one server, on one set of weights. Requests
without speculation teach no drafter anything; the key keeps the prefix caches apart too.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from server.commands.bench import first_model
from server.commands.bench_http import Answer
from server.commands.bench_prompts import Prompt
from server.commands.bench_report import acceptance_length
from server.errors import StartupError
from server.gguf import find
from tests.bench.real_prompts import Question
from tests.bench.real_report import Ratio, grid, ratio
from tests.bench.serving import CpuWatch, Server, Turn, ask, free_port

OFF, ON = "off", "on"
_BY_SOURCE = re.compile(r'^foretoken_spec_draft_tokens_per_source_total\{source="(\w+)"\} (\S+)$', re.MULTILINE)
_WARM = [Prompt((("user", text),), "") for text in ("Name three colours.", "What is a river?", "Count to ten.")]
_LLAMA = "{program} -m {gguf} --host 127.0.0.1 --port {port} -np {rows} -c {context} --no-webui --cache-ram 0"
_LLAMA_CONTEXT = 4096
"""Tokens of one request there: the longest prompts have 2,600."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to ask a server."""

    name: str
    url: str
    api_key: str
    fields: dict[str, Any]

    def ask(self, prompts: Sequence[Prompt], concurrency: int) -> Turn:
        """Raises: SystemExit at the first error."""
        return ask(self.url, prompts, concurrency, self.fields, self.api_key)

    def drafted(self) -> dict[str, float]:
        """Draft tokens so far by source, of all arms of the server; empty for a server that does not tell."""
        answer = httpx.get(self.url.removesuffix("/v1") + "/metrics", timeout=30)
        return {name: float(value) for name, value in _BY_SOURCE.findall(answer.text)}


@dataclass(frozen=True, slots=True)
class ArmRound:
    """One arm's answers to the questions of one round."""

    arm: str
    concurrency: int
    round: int
    questions: Sequence[Question]
    turn: Turn
    drafted: dict[str, float]
    foreign: float
    """Cores that others used meanwhile."""

    def speed(self, task: str) -> float:
        """Tokens/s: of all, by the wall clock; of one task, over the summed times of its answers."""
        if task == "all":
            return self.turn.tokens_per_s
        answers = self.of(task)
        return sum(answer.num_completion for answer in answers) / sum(answer.last_s for answer in answers)

    def of(self, task: str) -> list[Answer]:
        """The answers of one task, or of all."""
        pairs = zip(self.questions, self.turn.answers, strict=True)
        return [answer for question, answer in pairs if task in ("all", question.task)]


@dataclass(slots=True)
class Servers:
    """Arms, and the servers behind them. Owns those that it started."""

    arms: list[Arm] = field(default_factory=list)
    started: dict[str, Server] = field(default_factory=dict)

    def close(self) -> None:
        """End what was started."""
        for server in self.started.values():
            server.close()


def own_arms(url: str, keys: Sequence[str], asked: dict[str, Any]) -> list[Arm]:
    """Off and on, each with its key. Args: `asked`, fields of every request."""
    named = {"model": first_model(url, keys[0]), **asked}
    return [
        Arm(OFF, url, keys[0], {**named, "speculative": {"enabled": False}}),
        Arm(ON, url, keys[1], {**named, "speculative": {"enabled": True, "metrics": True}}),
    ]


def start(words: Sequence[str], asked: dict[str, Any], servers: Servers) -> None:
    """Start `foretoken serve` with these words behind it, and add its arms. Raises: SystemExit if it does not start."""
    port, keys = free_port(), ("bench-off", "bench-on")
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        *words,
        "--port",
        str(port),
        "--wait-for-compile",
        "--api-key",
        *keys,
    ]
    server = servers.started["foretoken"] = Server(command, port, "/ready", {})
    servers.arms += own_arms(server.url, keys, asked)


def start_llama(program: str, model: str, flags: str, num_rows: int, asked: dict[str, Any], servers: Servers) -> None:
    """Start llama.cpp's server on the same file with these flags, and add it. Raises: SystemExit."""
    try:
        gguf = find(model)
    except StartupError as error:
        raise SystemExit(str(error)) from error
    if gguf is None:
        raise SystemExit(f"--llama-server: {model} is no GGUF file")
    name, port = " ".join(["llama", *flags.split()[-1:]]), free_port()
    holes = {"program": program, "gguf": gguf, "port": port, "rows": num_rows, "context": num_rows * _LLAMA_CONTEXT}
    command = [word.format(**holes) for word in shlex.split(_LLAMA)] + shlex.split(flags)
    server = servers.started[name] = Server(command, port, "/health", {})
    servers.arms.append(Arm(name, server.url, "", {"model": "m", **asked}))


def measure(servers: Servers, rounds: dict[int, list[list[Question]]]) -> list[ArmRound]:
    """All arms in turns, another one first in each round. Args: `rounds`, the questions by concurrency and round."""
    for arm in servers.arms:
        arm.ask(_WARM, len(_WARM))
    records = []
    for concurrency, shares in rounds.items():
        for number, questions in enumerate(shares):
            first = number % len(servers.arms)
            for arm in servers.arms[first:] + servers.arms[:first]:
                before = arm.drafted() if arm.name == ON else {}
                watch = CpuWatch(servers.started)
                turn = arm.ask([question.prompt for question in questions], concurrency)
                foreign = watch.cores()["foreign"] if servers.started else 0.0
                after = arm.drafted() if arm.name == ON else {}
                drafted = {name: after[name] - before.get(name, 0.0) for name in after}
                records.append(ArmRound(arm.name, concurrency, number, questions, turn, drafted, foreign))
                print(f"c={concurrency} round {number + 1} {arm.name}: {turn.tokens_per_s:.1f} tok/s", file=sys.stderr)
    return records


def pooled(records: Sequence[ArmRound], task: str) -> float:
    """Tokens/s over all rounds of one arm, as one."""
    if task == "all":
        num_tokens = sum(answer.num_completion for record in records for answer in record.turn.answers)
        return num_tokens / sum(record.turn.wall_s for record in records)
    answers = [answer for record in records for answer in record.of(task)]
    return sum(answer.num_completion for answer in answers) / sum(answer.last_s for answer in answers)


def differences(records: Sequence[ArmRound]) -> tuple[list[str], int]:
    """Where the texts of off and on differ, and how many were compared."""
    by_arm = {arm: [record for record in records if record.arm == arm] for arm in (OFF, ON)}
    different, num_compared = [], 0
    for off in by_arm[OFF]:
        on = next(one for one in by_arm[ON] if (one.concurrency, one.round) == (off.concurrency, off.round))
        for question, mine, theirs in zip(off.questions, on.turn.answers, off.turn.answers, strict=True):
            num_compared += 1
            if mine.text != theirs.text:
                pairs = zip(mine.text, theirs.text, strict=False)
                length = min(len(mine.text), len(theirs.text))
                place = next((index for index, (a, b) in enumerate(pairs) if a != b), length)
                different.append(f"c={off.concurrency} round {off.round + 1} {question.task}: from character {place}")
    return different, num_compared


def shares_of(records: Sequence[ArmRound]) -> dict[str, float]:
    """Each source's share of the drafted tokens."""
    total: dict[str, float] = {}
    for record in records:
        for name, count in record.drafted.items():
            total[name] = total.get(name, 0.0) + count
    return {name: round(count / sum(total.values()), 3) for name, count in total.items() if count}


def _drafting_share(answers: Sequence[Answer]) -> float:
    """How many of the steps behind first tokens carried a draft.

    Every step wins one token of the target's own, but one that ends its answer by a draft: the share may be too high by
    one step an answer.
    """
    told = [(answer, answer.speculation) for answer in answers if answer.speculation is not None]
    num_steps = sum(answer.num_completion - 1 - one.num_accepted_draft_tokens for answer, one in told)
    return min(1.0, sum(one.num_spec_steps for _, one in told) / num_steps) if num_steps > 0 else 0.0


def report(records: Sequence[ArmRound], tasks: Sequence[str]) -> dict[str, Any]:
    """Print the tables; returns what the JSON line carries."""
    result: dict[str, Any] = {"on_off": {}, "arms": {}, "sources": {}}
    rows, arm_rows = [], []
    for concurrency in sorted({record.concurrency for record in records}):
        here = [record for record in records if record.concurrency == concurrency]
        by_arm: dict[str, list[ArmRound]] = {}
        for record in sorted(here, key=lambda record: record.round):
            by_arm.setdefault(record.arm, []).append(record)
        result["sources"][concurrency] = shares_of(by_arm[ON])
        for task in [*tasks, "all"]:
            cells, row = _row(by_arm, task)
            rows.append([str(concurrency), *cells])
            result["on_off"].setdefault(concurrency, {})[task] = row
        for name, turns in by_arm.items():
            over = _ratio(by_arm, ON, name, "all")
            arm_rows.append([str(concurrency), name, f"{pooled(turns, 'all'):.1f}", str(over)])
            result["arms"].setdefault(concurrency, {})[name] = {
                "tokens_per_s": round(pooled(turns, "all"), 2),
                "on_over_it": _rounded(over),
                "foreign_cores": round(max(turn.foreign for turn in turns), 2),
            }
    head = ["c", "task", "off tok/s", "on tok/s", "on / off, all rounds", "median of rounds (range)", "acceptance"]
    print(grid([*head, "steps with drafts"], rows))
    if len(arm_rows) > 2 * len(result["arms"]):
        print("\n" + grid(["c", "arm", "tok/s", "on / it, median of rounds (range)"], arm_rows))
    for concurrency, shares in result["sources"].items():
        print(f"drafted at c={concurrency}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return result


def _row(by_arm: dict[str, list[ArmRound]], task: str) -> tuple[list[str], dict[str, Any]]:
    off, on = pooled(by_arm[OFF], task), pooled(by_arm[ON], task)
    rounds = _ratio(by_arm, ON, OFF, task)
    answers = [answer for record in by_arm[ON] for answer in record.of(task)]
    length, share = acceptance_length(answers) or 1.0, _drafting_share(answers)
    cells = [task, f"{off:.1f}", f"{on:.1f}", f"{on / off:.2f}", str(rounds), f"{length:.2f}", f"{share:.0%}"]
    return cells, {
        "off": round(off, 2),
        "on": round(on, 2),
        "ratio": round(on / off, 4),
        "rounds": _rounded(rounds),
        "acceptance_length": round(length, 3),
        "drafting_share": round(share, 3),
    }


def _ratio(by_arm: dict[str, list[ArmRound]], over: str, under: str, task: str) -> Ratio:
    mine, theirs = ([record.speed(task) for record in by_arm[name]] for name in (over, under))
    return ratio(mine, theirs)


def _rounded(found: Ratio) -> list[float]:
    """Median, least, most."""
    return [round(value, 4) for value in (found.median, found.low, found.high)]
