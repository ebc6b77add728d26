"""`foretoken bench`: one server, the same prompts, speculation on and off, round by round in one run.

Machines drift, so the arms take turns: in every round each arm answers the same prompts at the same concurrency, and
the arm that goes first changes from round to round (the second one finds the prompts in the prefix cache). Every round
has prompts of its own: a drafter that learns on line would otherwise be asked what it has just heard itself say. The
ratio is the median over paired rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.commands.bench_http import Answer, Target, post_stream
from server.commands.bench_prompts import PATHS, Prompt, read_prompts
from server.commands.bench_report import Round, report, to_json_line
from server.commands.first_model import first_model, wait_until_it_drafts
from server.config import SettingsError

ARMS = ("on", "off", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to send, how often, and how many at a time."""

    model: str
    concurrency: tuple[int, ...]
    arms: tuple[str, ...]
    rounds: int
    num_warmup: int
    per_round: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool
    salt: bool
    timeout_s: float
    drafter: str = ""
    max_nodes: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken bench`."""
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server [%(default)s]")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="key to send [$OPENAI_API_KEY]")
    add("--model", default="", help="model name [the first one the server lists]")
    add("--prompts", required=True, metavar="FILE", help=".jsonl or .txt, also .gz and .xz: see docs/api.md")
    add("--endpoint", default="auto", choices=("auto", "chat", "completions"), help="how to ask [auto: by the file]")
    add("--cut-chars", type=int, default=0, metavar="N", help="keep the first N characters of plain texts [all]")
    add("--concurrency", type=int, nargs="+", default=[1, 8], metavar="C", help="requests in flight [1 8]")
    add("--arms", nargs="+", default=["on", "off"], choices=ARMS, help="plain sends no `speculative` field [on off]")
    add("--rounds", type=int, default=4, help="counted rounds of every arm, at each concurrency [%(default)s]")
    add("--num-prompts", type=int, default=0, metavar="N", help="prompts of one round [what the file allows, <= 32]")
    add("--warmup", type=int, default=8, metavar="N", help="uncounted prompts in every arm first [%(default)s]")
    add("--max-tokens", type=int, default=128, help="tokens of one answer at most [%(default)s]")
    add("--temperature", type=float, default=0.0, help="[%(default)s: greedy]")
    add("--top-p", type=float, default=1.0, help="[%(default)s]")
    add("--seed", type=int, default=1, help="seed of the first prompt; the next one adds 1 [%(default)s]")
    add("--ignore-eos", action="store_true", help="answers of full length (not every server knows the field)")
    add("--salt", action="store_true", help="a random prefix before each prompt: no prefix cache, texts not compared")
    add("--drafter", default="", help="drafter of the `on` arm [the server's]")
    add("--max-nodes", type=int, default=0, help="tree nodes of the `on` arm, root included [the server's]")
    add("--timeout-s", type=float, default=600.0, help="longest wait for one answer [%(default)s]")
    add("--save", default="", metavar="FILE", help="also write the JSON record and every answer's times here")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if any request failed."""
    if arguments.save:
        _check_writable(Path(arguments.save))
    prompts = read_prompts(arguments.prompts, arguments.endpoint, arguments.cut_chars)
    target = Target.parse(arguments.url, arguments.api_key)
    options = _options(arguments, len(prompts))
    if not options.model:
        options = replace(options, model=first_model(arguments.url, arguments.api_key))
    wait_until_it_drafts(arguments.url, _progress)
    _progress(_shares(options, len(prompts)))
    rounds = asyncio.run(Bench(target, options, prompts, _progress).run())
    about = {
        "bench": "serve",
        "url": arguments.url,
        "model": options.model,
        "prompts": Path(arguments.prompts).name,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "prompts_per_round": options.per_round,
    }
    text, record = report(rounds, about, compare_texts=not options.salt)
    print(text)
    print(to_json_line(record), flush=True)
    if arguments.save:
        _save(arguments.save, record, rounds)
    return 1 if any(answer.error for one in rounds for answer in one.answers) else 0


def _check_writable(path: Path) -> None:
    """A measurement takes minutes: find out before it that its record cannot be kept."""
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise SettingsError(f"--save {path}: {error.strerror}") from error


def _options(arguments: argparse.Namespace, num_prompts: int) -> BenchOptions:
    limits = {"concurrency": min(arguments.concurrency), "rounds": arguments.rounds, "max-tokens": arguments.max_tokens}
    for name, value in limits.items():
        if value < 1:
            raise SettingsError(f"--{name}: must be at least 1, got {value}")
    if len(set(arguments.arms)) != len(arguments.arms):
        raise SettingsError("--arms: each arm once")
    num_shares = arguments.rounds * len(arguments.concurrency)
    fitting = (num_prompts - arguments.warmup) // num_shares
    per_round = arguments.num_prompts or min(32, fitting)
    if arguments.warmup < 0 or per_round < 1 or per_round > fitting:
        needed = max(per_round, 1) * num_shares + max(arguments.warmup, 0)
        raise SettingsError(
            f"--prompts: {num_prompts} prompts are too few, {needed} are needed: every round has its own "
            f"({max(per_round, 1)} x {arguments.rounds} rounds x {len(arguments.concurrency)} concurrencies, "
            f"{arguments.warmup} for --warmup)"
        )
    if per_round < max(arguments.concurrency):
        raise SettingsError(
            f"--concurrency: {max(arguments.concurrency)} needs as many prompts in a round, there are {per_round} "
            f"(of {num_prompts} in the file, --warmup takes {arguments.warmup})"
        )
    return BenchOptions(
        model=arguments.model,
        concurrency=tuple(arguments.concurrency),
        arms=tuple(arguments.arms),
        rounds=arguments.rounds,
        num_warmup=arguments.warmup,
        per_round=per_round,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        salt=arguments.salt,
        timeout_s=arguments.timeout_s,
        drafter=arguments.drafter,
        max_nodes=arguments.max_nodes,
    )


def _shares(options: BenchOptions, num_prompts: int) -> str:
    """Where the prompts of the file go."""
    num_shares = options.rounds * len(options.concurrency)
    counted = num_shares * options.per_round
    line = f"prompts: {num_prompts} in the file, {options.num_warmup} for the warm-up, {counted} counted"
    return (
        f"{line} ({options.per_round} in each of {options.rounds} rounds x {len(options.concurrency)} concurrencies), "
        f"{num_prompts - options.num_warmup - counted} unused"
    )


class Bench:
    """One run against one server. Owns the order of everything that is sent."""

    def __init__(
        self, target: Target, options: BenchOptions, prompts: Sequence[Prompt], tell: Callable[[str], None]
    ) -> None:
        self._target = target
        self._options = options
        self._prompts = prompts
        self._tell = tell
        self._random = random.Random(options.seed)

    async def run(self) -> list[Round]:
        """Warm up, then all rounds; only the latter come back."""
        options = self._options
        warmup = list(range(options.num_warmup))
        for arm in options.arms if warmup else ():
            self._tell(f"warm-up, {arm}")
            tried = await self._round(max(options.concurrency), arm, -1, warmup)
            if not tried.good:
                raise SettingsError(f"warm-up, {arm}: no request was answered: {tried.answers[0].error}")
        done: list[Round] = []
        used = options.num_warmup
        for number in range(options.rounds):
            for concurrency in options.concurrency:
                share = list(range(used, used + options.per_round))
                used += options.per_round
                for arm in options.arms if number % 2 == 0 else options.arms[::-1]:
                    one = await self._round(concurrency, arm, number, share)
                    done.append(one)
                    self._tell(
                        f"round {number + 1}/{options.rounds} c={concurrency} {arm}: {one.tokens_per_s:.1f} tok/s"
                    )
        return done

    async def _round(self, concurrency: int, arm: str, number: int, share: Sequence[int]) -> Round:
        """Answer the prompts of one share, `concurrency` at a time, each seat taking the next one as it gets free."""
        requests = [self._request(index, arm) for index in share]
        answers: list[Answer | None] = [None] * len(requests)
        waiting = iter(range(len(requests)))

        async def seat() -> None:
            for position in waiting:
                path, body = requests[position]
                answers[position] = await post_stream(self._target, path, body, self._options.timeout_s)

        begin = time.perf_counter()
        await asyncio.gather(*(seat() for _ in range(min(concurrency, len(requests)))))
        wall_s = time.perf_counter() - begin
        return Round(concurrency, arm, number, wall_s, tuple(answer for answer in answers if answer is not None))

    def _request(self, index: int, arm: str) -> tuple[str, bytes]:
        options, prompt = self._options, self._prompts[index]
        body: dict[str, Any] = {
            "model": options.model,
            **prompt.body(f"{self._random.getrandbits(32):08x} " if options.salt else ""),
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed + index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        if arm == "off":
            body["speculative"] = {"enabled": False}
        elif arm == "on":
            body["speculative"] = {"enabled": True, "metrics": True}
            if options.drafter:
                body["speculative"]["drafter"] = options.drafter
            if options.max_nodes:
                body["speculative"]["max_nodes"] = options.max_nodes
        return PATHS[prompt.endpoint], json.dumps(body).encode()


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _save(path: str, record: dict[str, Any], rounds: Sequence[Round]) -> None:
    detail = [
        {
            "concurrency": one.concurrency,
            "arm": one.arm,
            "round": one.number,
            "wall_s": one.wall_s,
            "answers": [
                {
                    "prompt_tokens": answer.num_prompt,
                    "completion_tokens": answer.num_completion,
                    "chunks": answer.num_chunks,
                    "ttft_s": answer.first_s,
                    "last_s": answer.last_s,
                    "error": answer.error,
                }
                for answer in one.answers
            ],
        }
        for one in rounds
    ]
    try:
        Path(path).write_text(json.dumps({**record, "detail": detail}) + "\n", encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--save {path}: {error.strerror}") from error
