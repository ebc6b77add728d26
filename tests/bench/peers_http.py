"""This server without speculation beside its peers, over HTTP on a CPU: one run, turns interleaved.

    python -m tests.bench.peers_http --model FOLDER --gguf FILE --peers FOLDER --arm ours llama vllm transformers

Every arm gets the same bfloat16 weights, the same prompts of `--prompt-tokens` tokens as text, and answers greedily
with `--max-tokens` tokens, end of text ignored. In each round the arms take turns, the first one changing from round
to round, and each round has prompts of its own; only the arm whose turn it is works. A turn's record goes to the file
`--turns` as one JSON line, so that several short runs, each with a `--seed` of its own, can be reported as one
(`python -m tests.bench.peers_report FILE`).

An arm is NAME or NAME=FLAGS: what the name begins with (up to a "-") is the server, flags are appended to its command
line, and words like VAR=VALUE before the first flag go into its environment. So two settings of one peer can run
side by side:  --arm "ours=--threads 1" "vllm-1=VLLM_CPU_OMP_THREADS_BIND=0" "vllm-2=VLLM_CPU_OMP_THREADS_BIND=0-1".
`--peers` is a folder with `llama-server`, `vllm` and `transformers` in it, as links to wherever they are installed.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from server.commands.bench_prompts import Prompt
from tests.bench.peers_report import print_report, read_turns
from tests.bench.random_model import standard_library
from tests.bench.serving import CpuWatch, Server, Turn, ask, free_port

_PAUSE_S = 0.3
"""Between turns, for the last one's server to come to rest."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How one server is started and asked."""

    command: str
    ready: str
    fields: dict[str, Any]
    """Of a request, beside what all of them get."""


def kinds(max_tokens: int) -> dict[str, Kind]:
    """Every server that this bench knows, by name; the commands have holes for what `start` knows."""
    # transformers serve has no ignore_eos; a generation config of the request may say that nothing ends a text.
    endless = json.dumps({"eos_token_id": -1, "max_new_tokens": max_tokens, "do_sample": False})
    return {
        "ours": Kind(
            "{python} -m server.cli serve {model} --port {port} --served-model-name m --dtype bfloat16 --max-nodes 1",
            "/ready",
            {"model": "m", "ignore_eos": True},
        ),
        "llama": Kind(
            "{peers}/llama-server -m {gguf} --port {port} -np 8 -c 8192 --no-webui --cache-ram 0",
            "/health",
            {"model": "m", "ignore_eos": True},
        ),
        "vllm": Kind(
            "{peers}/vllm serve {model} --port {port} --host 127.0.0.1 --served-model-name m --dtype bfloat16"
            " --max-model-len 1024 --max-num-seqs 8 --no-enable-log-requests",
            "/health",
            {"model": "m", "ignore_eos": True},
        ),
        "transformers": Kind(
            "{peers}/transformers serve {model} --continuous-batching --device cpu --dtype bfloat16 --host 127.0.0.1"
            " --port {port} --attn-implementation sdpa --cb-num-blocks 256",
            "/health",
            {"model": "{model}", "generation_config": endless},
        ),
    }


@dataclass(frozen=True, slots=True)
class Arm:
    """One server that runs."""

    name: str
    server: Server
    fields: dict[str, Any]


def start(spec: str, options: argparse.Namespace) -> Arm:
    """Start the server of one --arm. Raises: SystemExit if the name is unknown or the server does not come up."""
    name, _, flags = spec.partition("=")
    known = kinds(options.max_tokens)
    if (kind := known.get(name.partition("-")[0])) is None:
        raise SystemExit(f"--arm {name}: expected a name that begins with one of {', '.join(known)}")
    port = free_port()
    holes = {
        "python": sys.executable,
        "model": options.model,
        "gguf": options.gguf,
        "peers": options.peers,
        "port": port,
    }
    words = shlex.split(flags)
    environ: dict[str, str] = {}
    while words and not words[0].startswith("-"):
        variable, _, value = words.pop(0).partition("=")
        environ[variable] = value
    began = time.perf_counter()
    command = [*(word.format(**holes) for word in kind.command.split()), *words]
    server = Server(command, port, kind.ready, environ)
    print(f"{name}: ready after {time.perf_counter() - began:.0f} s: {shlex.join(command)}", file=sys.stderr)
    fields = {**kind.fields, "max_tokens": options.max_tokens}
    fields["model"] = fields["model"].format(**holes)
    return Arm(name, server, fields)


def make_prompts(folder: str, num_tokens: int, seed: int) -> Iterator[Prompt]:
    """Windows of the standard library's sources that are exactly `num_tokens` tokens also when read back, shuffled."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = standard_library()
    shuffled = random.Random(seed)
    while True:
        text = shuffled.choice(texts)
        begin = shuffled.randrange(max(1, len(text) - 20 * num_tokens))
        window = text[begin : begin + 20 * num_tokens]
        if not window.isascii():
            continue
        ids = tokenizer.encode(window, add_special_tokens=False)[:num_tokens]
        cut = tokenizer.decode(ids)
        if len(ids) == num_tokens and tokenizer.encode(cut) == ids:
            yield Prompt((), cut)


def same_start(mine: str, theirs: str) -> float:
    """Share of the longer text up to the first difference: how alike two arms' answers are."""
    longest = max(len(mine), len(theirs))
    pairs = enumerate(zip(mine, theirs, strict=False))
    first = next((index for index, (one, other) in pairs if one != other), min(len(mine), len(theirs)))
    return first / longest if longest else 1.0


def take_turn(
    arm: Arm, servers: dict[str, Server], prompts: list[Prompt], concurrency: int
) -> tuple[Turn, dict[str, Any]]:
    """Ask one arm; the turn, and what a record says of it. Raises: SystemExit if an answer is not what was asked."""
    time.sleep(_PAUSE_S)
    watch = CpuWatch(servers)
    turn = ask(arm.server.url, prompts, concurrency, arm.fields)
    cores = watch.cores()
    wrong = [answer for answer in turn.answers if answer.num_completion != arm.fields["max_tokens"]]
    if wrong:
        raise SystemExit(f"{arm.name}: an answer of {wrong[0].num_completion} tokens")
    tpots = [answer.tpot_s for answer in turn.answers if answer.tpot_s]
    return turn, {
        "tokens_per_s": round(turn.tokens_per_s, 2),
        "ttft_ms": round(statistics.median(answer.first_s for answer in turn.answers) * 1e3, 2),
        "tpot_ms": round(statistics.median(tpots) * 1e3, 3) if tpots else None,
        "prompt_tokens": sorted({answer.num_prompt for answer in turn.answers}),
        "cores": round(cores[arm.name], 3),
        "client": round(cores["client"], 3),
        "foreign": round(cores["foreign"], 3),
        "stolen": round(cores["stolen"], 3),
        "idle": {name: round(cores[name], 3) for name in servers if name != arm.name},
        "resident_mb": round(arm.server.usage()[1] / 1e6),
    }


def measure(options: argparse.Namespace, arms: list[Arm]) -> Iterator[dict[str, Any]]:
    """The records of all turns, as they end."""
    servers = {arm.name: arm.server for arm in arms}
    source = make_prompts(options.model, options.prompt_tokens, options.seed)
    seats = list(zip(options.concurrency, options.requests, strict=True))
    for concurrency, _ in seats:  # not counted
        share = [next(source) for _ in range(concurrency)]
        for arm in arms:
            ask(arm.server.url, share, concurrency, arm.fields)
    for number in range(options.rounds):
        first = (number + options.seed) % len(arms)
        for concurrency, num_requests in seats:
            share = [next(source) for _ in range(num_requests)]
            texts: dict[str, list[str]] = {}
            records = {}
            for arm in arms[first:] + arms[:first]:
                turn, record = take_turn(arm, servers, share, concurrency)
                texts[arm.name] = [answer.text for answer in turn.answers]
                records[arm.name] = record
            for name, record in records.items():
                pairs = zip(texts[name], texts[arms[0].name], strict=True)
                alike = statistics.mean(same_start(mine, theirs) for mine, theirs in pairs)
                round_name = f"{options.seed}.{number}"
                yield {"round": round_name, "concurrency": concurrency, "arm": name, **record, "alike": round(alike, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", default="", help="the same model for llama-server")
    parser.add_argument("--peers", default="", help="folder of the peers' programs")
    parser.add_argument("--arm", nargs="+", required=True, metavar="NAME[=FLAGS]")
    parser.add_argument("--turns", required=True, help="file that the turns' records are appended to")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 16], help="of a turn, for each concurrency")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, and which arm goes first")
    parser.add_argument("--max-foreign", type=float, default=0.1, help="most cores of others in a round that counts")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that no server is left behind
    arms: list[Arm] = []
    try:
        for spec in options.arm:
            arms.append(start(spec, options))
        with Path(options.turns).open("a") as turns:
            for record in measure(options, arms):
                print(json.dumps(record), file=turns, flush=True)
    finally:
        for arm in arms:
            arm.server.close()
    print_report(read_turns([options.turns]), options.max_foreign)


if __name__ == "__main__":
    main()
