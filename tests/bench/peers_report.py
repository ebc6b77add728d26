"""What the turns of peers_http say: medians by arm, and ours against the best of the peers.

    python -m tests.bench.peers_report FILE ... [--max-foreign 0.1]

A round at one concurrency counts only if the rest of the machine used at most `--max-foreign` cores in each of its
turns. Ratios are medians of paired rounds; TTFT is compared by medians, with that of the quickest peer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rounds = dict[str, dict[str, dict[str, Any]]]
"""Records by round and by arm, of one concurrency."""
BEST_OF = ("llama", "vllm")
"""Arms whose names begin so are the peers that ours is to be as good as the best of."""


def read_turns(paths: Sequence[str]) -> list[dict[str, Any]]:
    """The records of all files."""
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines() if line]


def quiet_rounds(turns: Sequence[dict[str, Any]], max_foreign: float) -> tuple[dict[int, Rounds], dict[int, int]]:
    """By concurrency: the rounds that count, and how many do not (disturbed, or broken off half-way)."""
    every: dict[int, Rounds] = defaultdict(lambda: defaultdict(dict))
    for turn in turns:
        every[turn["concurrency"]][turn["round"]][turn["arm"]] = turn
    arms = {turn["arm"] for turn in turns}
    kept: dict[int, Rounds] = {}
    left_out: dict[int, int] = {}
    for concurrency, rounds in sorted(every.items()):
        kept[concurrency] = {
            name: by_arm
            for name, by_arm in rounds.items()
            if set(by_arm) == arms and max(turn["foreign"] for turn in by_arm.values()) <= max_foreign
        }
        left_out[concurrency] = len(rounds) - len(kept[concurrency])
    return kept, left_out


def compare(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Medians of each arm, and the ratio of every "ours" to every other arm: "of_ARM" of tokens/s, "ttft_of_ARM"."""
    table: dict[str, dict[str, float]] = {}
    arms = list(next(iter(rounds.values())))
    for name in arms:
        mine = [by_arm[name] for by_arm in rounds.values()]
        row = {key: statistics.median(turn[key] for turn in mine) for key in ("tokens_per_s", "ttft_ms", "tpot_ms")}
        row["slowest"] = min(turn["tokens_per_s"] for turn in mine)
        row["quickest"] = max(turn["tokens_per_s"] for turn in mine)
        for key in ("cores", "foreign", "stolen", "resident_mb"):
            row[key] = max(turn[key] for turn in mine)
        row["idle"] = max((max(turn["idle"].values(), default=0.0) for turn in mine), default=0.0)
        row["alike"] = statistics.mean(turn["alike"] for turn in mine)
        table[name] = row
    for name in (arm for arm in arms if arm.startswith("ours")):
        for other in (arm for arm in arms if not arm.startswith("ours")):
            for key, label in (("tokens_per_s", f"of_{other}"), ("ttft_ms", f"ttft_of_{other}")):
                pairs = [by_arm[name][key] / by_arm[other][key] for by_arm in rounds.values()]
                table[name][label] = round(statistics.median(pairs), 3)
    return table


def print_report(turns: Sequence[dict[str, Any]], max_foreign: float) -> None:
    """Print the tables and one JSON line."""
    kept, left_out = quiet_rounds(turns, max_foreign)
    record: dict[str, Any] = {"bench": "peers_http", "rounds": {}, "left_out": left_out}
    heads = ("tok/s", "min", "max", "TTFT ms", "TPOT ms", "cores", "foreign", "stolen", "idle", "MB", "alike")
    print(f"{'c':>2} {'arm':<14}" + "".join(f"{head:>9}" for head in heads))
    for concurrency, rounds in kept.items():
        record["rounds"][concurrency] = len(rounds)
        if not rounds:
            print(f"{concurrency:>2} no round that counts, {left_out[concurrency]} left out")
            continue
        table = compare(rounds)
        for name, row in table.items():
            speeds = f"{row['tokens_per_s']:9.1f}{row['slowest']:9.1f}{row['quickest']:9.1f}"
            times = f"{row['ttft_ms']:9.1f}{row['tpot_ms']:9.2f}"
            use = "".join(f"{row[key]:9.2f}" for key in ("cores", "foreign", "stolen", "idle"))
            print(f"{concurrency:>2} {name:<14}{speeds}{times}{use}{row['resident_mb']:9.0f}{row['alike']:9.2f}")
            record[f"{name} c={concurrency}"] = row
        for name in (arm for arm in table if arm.startswith("ours")):
            _print_verdict(table, name, concurrency)
    print(json.dumps(record))


def _print_verdict(table: dict[str, dict[str, float]], name: str, concurrency: int) -> None:
    row = table[name]
    peers = [arm for arm in table if arm.startswith(BEST_OF)]
    if peers:
        best = max(peers, key=lambda arm: table[arm]["tokens_per_s"])
        first = min(peers, key=lambda arm: table[arm]["ttft_ms"])
        speed, ttft = row[f"of_{best}"], row[f"ttft_of_{first}"]
        print(f"{concurrency:>2} {name}: {speed:.2f} of {best}'s tokens/s, {ttft:.2f} of {first}'s TTFT")
    if "of_transformers" in row:
        print(f"{concurrency:>2} {name}: {row['of_transformers']:.2f} of transformers serve's tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("turns", nargs="+")
    parser.add_argument("--max-foreign", type=float, default=0.1)
    options = parser.parse_args()
    print_report(read_turns(options.turns), options.max_foreign)


if __name__ == "__main__":
    main()
