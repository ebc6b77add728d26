"""One interleaved run: this server with speculation on and off, `generate` in process, `transformers serve` beside it.

    python -m tests.bench.peers_serve --model FOLDER --prompts FILE [--table TABLE] [--rounds 5] [--concurrency 1 8]

Same weights, float32, same number of compute threads, greedy, full-length answers (end of text ignored), the same
prompts for every arm of a round, every round with prompts of its own, the first arm changing from round to round.
Prints tokens/s per arm (median of rounds), the paired ratios, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.commands.bench_prompts import Prompt, read_prompts
from tests.bench.serving import Server, ask, free_port

Work = Callable[[int, list[Prompt]], tuple[int, float]]


def http_arm(server: Server, fields: dict[str, Any]) -> Work:
    """Ask a server, `concurrency` requests at a time."""

    def work(concurrency: int, prompts: list[Prompt]) -> tuple[int, float]:
        turn = ask(server.url, prompts, concurrency, fields)
        return sum(answer.num_completion for answer in turn.answers), turn.wall_s

    return work


def generate_arm(folder: str, max_tokens: int) -> Work:
    """transformers' generate, prompts in batches of `concurrency`, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()

    def encode(prompt: Prompt) -> str:
        if not prompt.messages:
            return prompt.text
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def work(concurrency: int, prompts: list[Prompt]) -> tuple[int, float]:
        num_tokens = 0
        began = time.perf_counter()
        for first in range(0, len(prompts), concurrency):
            batch = prompts[first : first + concurrency]
            texts = [encode(prompt) for prompt in batch]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not batch[0].messages)
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            num_tokens += (out.shape[1] - inputs["input_ids"].shape[1]) * len(batch)
        return num_tokens, time.perf_counter() - began

    return work


def start_arms(options: argparse.Namespace) -> tuple[dict[str, Work], list[Server]]:
    """Every arm by name, and the servers behind them."""
    environ = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", options.model, "--port", str(port), "--wait-for-compile"]
    command += ["--served-model-name", "m", "--threads", str(options.threads), "--dtype", "float32"]
    if options.table:
        command += ["--trigram-table", options.table]
    if options.max_nodes:
        command += ["--max-nodes", str(options.max_nodes)]
    ours = Server(command, port, "/ready", environ)
    own = {"model": "m", "max_tokens": options.max_tokens, "ignore_eos": True}
    arms = {
        "off": http_arm(ours, {**own, "speculative": {"enabled": False}}),
        "on": http_arm(ours, own),
        "generate": generate_arm(options.model, options.max_tokens),
    }
    servers = [ours]
    if options.peer:
        port = free_port()
        program = str(Path(sys.executable).with_name("transformers"))
        command = [program, "serve", options.model, "--continuous-batching", "--device", "cpu"]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--attn-implementation", "sdpa", "--cb-num-blocks", "256"]
        peer = Server(command, port, "/health", environ)
        # It has no ignore_eos; a generation config of the request may say that nothing ends a text.
        config = json.dumps({"eos_token_id": -1, "max_new_tokens": options.max_tokens, "do_sample": False})
        body = {"model": options.model, "max_tokens": options.max_tokens, "generation_config": config}
        arms["tf-serve"] = http_arm(peer, body)
        servers.append(peer)
    return arms, servers


def measure(options: argparse.Namespace, arms: dict[str, Work], prompts: list[Prompt]) -> dict[str, Any]:
    """tokens/s of every arm in every round, by concurrency."""
    speed: dict[str, dict[str, list[float]]] = {}
    names = list(arms)
    used = 0

    def take() -> list[Prompt]:
        nonlocal used
        used += options.per_round
        share = prompts[used - options.per_round : used]
        if len(share) < options.per_round:
            raise SystemExit("--prompts: too few for so many rounds")
        return share

    for name in names:  # not counted
        arms[name](max(options.concurrency), prompts[-options.per_round :])
    for number in range(options.rounds):
        for concurrency in options.concurrency:
            share = take()
            for name in names[number % len(names) :] + names[: number % len(names)]:
                num_tokens, wall_s = arms[name](concurrency, share)
                speed.setdefault(str(concurrency), {}).setdefault(name, []).append(num_tokens / wall_s)
                print(f"round {number + 1} c={concurrency} {name}: {num_tokens / wall_s:.0f}", file=sys.stderr)
    return speed


def report(speed: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Print the table; returns what the JSON line carries."""
    record: dict[str, Any] = {}
    print(f"{'c':>3} {'arm':>9} {'tok/s':>8} {'of generate':>12} {'of off':>8} {'of tf-serve':>12}")
    for concurrency, by_arm in speed.items():
        for name, values in by_arm.items():
            row: dict[str, Any] = {"tokens_per_s": round(statistics.median(values), 1)}
            for base in ("generate", "off", "tf-serve"):
                if base in by_arm:
                    pairs = [mine / theirs for mine, theirs in zip(values, by_arm[base], strict=True)]
                    row[f"of_{base}"] = round(statistics.median(pairs), 3)
            record[f"{name} c={concurrency}"] = row
            own, off, peer = (row.get(f"of_{base}", float("nan")) for base in ("generate", "off", "tf-serve"))
            print(f"{concurrency:>3} {name:>9} {row['tokens_per_s']:8.0f} {own:12.2f} {off:8.2f} {peer:12.2f}")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--table", default="")
    parser.add_argument("--endpoint", default="auto", choices=("auto", "chat", "completions"))
    parser.add_argument("--cut-chars", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-nodes", type=int, default=0)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--per-round", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prompts = read_prompts(options.prompts, options.endpoint, options.cut_chars)
    arms, servers = start_arms(options)
    try:
        record = report(measure(options, arms, prompts))
    finally:
        for server in servers:
            server.close()
    print(json.dumps({"bench": "peers_serve", "model": Path(options.model).name, "threads": options.threads, **record}))


if __name__ == "__main__":
    main()
