"""What speculation is worth on real chat models: Spec-Bench's six tasks, HumanEval, GSM8K; every prompt new to its arm.

    python -m tests.bench.real_models http [--tasks chat qa ...] [--per-task 20] [--concurrency 1 4 8] [-- MODEL FLAGS]
    python -m tests.bench.real_models http --llama-server PROGRAM -- FILE.gguf
    python -m tests.bench.real_models replay [--nodes 8 16 64] [--temperatures 0 0.8] [-- MODEL FLAGS]
    python -m tests.bench.real_models effort [--concurrency 1 2 4 8 16 32] [--rounds 8] [-- MODEL FLAGS]
    python -m tests.bench.real_models busy [--starts 10] [--beside-s 120] [-- MODEL FLAGS]

Behind `--` stand MODEL (a folder, a GGUF file or a Hub id) and flags of `foretoken serve`, such as --trigram-table and
--ctc-head; without any the server's own default model is taken, with its drafter files.

http: tokens/s with speculation off and on over HTTP, in turns; the acceptance length is that of steps that carried a
draft, and the last column tells how many did. A task's speed is its tokens over the summed times of its answers. With a
binary of llama.cpp's server the same prompts go to it as well: plain, and with its n-gram speculation. Exit code 1 if a
text of ours depends on speculation.
replay: acceptance length by task, sources and size of the trees, in process, with nothing cut, no times. Each cell
begins with nothing learned and learns on line. Tokens won per step, also of steps without a draft; the second table of
a temperature leaves out answers that loop. Exit code 1 if a text depends on the cell.
effort: tokens/s of the speculator beside plain decoding and trees of fixed sizes, in process, in turns: the ratio to
the best of them, with a 95 % interval by bootstrap over rounds.
busy: on / off over HTTP, c = 1, of servers that were started and used beside programs that keep all cores busy, and
then left alone, beside that of a server started quietly. All are asked the same prompts.

Prompts: --prompts names the folder of Spec-Bench's question.jsonl; ../humaneval/HumanEval.jsonl and ../gsm8k/test.jsonl
lie beside it. Leave the machine alone meanwhile. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server import cli, config, default_model
from server.config import Settings
from server.errors import StartupError
from tests.bench import real_busy, real_http
from tests.bench.real_prompts import SPEC_BENCH, TASKS, Group, Question, deal, read_tasks, rounds_of, shaper
from tests.bench.real_report import against_best, grid, is_looping
from tests.bench.tasks import SHARED

if TYPE_CHECKING:
    from tests.bench.real_replay import Cell

_LLAMA_FLAGS = ("", "--spec-type ngram-simple", "--spec-type ngram-map-k")


def settings_of(words: Sequence[str]) -> Settings:
    """As `foretoken serve` with these words behind it would have them. Raises: StartupError."""
    parser = cli.CommandParser(prog="foretoken serve")
    cli.add_arguments(parser)
    flags = vars(parser.parse_args(words))
    word = flags.pop("model_word")
    if word is not None:
        flags["model"] = word
    return config.load(flags, os.environ, without_model=default_model.defaults())


def groups_of(options: argparse.Namespace, num_groups: int) -> list[Group]:
    """So many questions of each task. Raises: SystemExit if there are too few."""
    names = [name for name in TASKS if name in options.tasks]
    shape = shaper(options.completions, options.cut_chars)
    return deal(read_tasks(options.prompts, names), num_groups, options.seed, shape)


# ---- http


def run_http(options: argparse.Namespace, words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The record and the exit code."""
    groups = groups_of(options, options.per_task * len(options.concurrency))
    rounds = {
        concurrency: rounds_of(groups[index * options.per_task :][: options.per_task], options.rounds)
        for index, concurrency in enumerate(options.concurrency)
    }
    asked: dict[str, Any] = {"max_tokens": options.max_tokens}
    if options.ignore_eos:
        asked["ignore_eos"] = True
    servers = real_http.Servers()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the servers would be left behind
    try:
        if options.url:
            servers.arms = real_http.own_arms(options.url, options.api_keys, asked)
        else:
            real_http.start(words, asked, servers)
        for flags in options.llama_flags if options.llama_server else ():
            model, num_rows = settings_of(words).model, max(options.concurrency)
            real_http.start_llama(options.llama_server, model, flags, num_rows, asked, servers)
        records = real_http.measure(servers, rounds)
    finally:
        servers.close()
    result = real_http.report(records, [question.task for question in groups[0]])
    different, num_compared = real_http.differences(records)
    print(f"same text with speculation off and on: {num_compared - len(different)} of {num_compared} prompts")
    print("".join(f"  {line}\n" for line in different[:20]), end="")
    return {**result, "compared_texts": num_compared, "different_texts": different}, 1 if different else 0


# ---- replay


def run_replay(options: argparse.Namespace, words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The record and the exit code."""
    from tests.bench.real_replay import Asking, Target, masks_of, num_different, replay_cell

    settings = settings_of(words)
    questions = [question for group in groups_of(options, options.per_task) for question in group]
    target = Target(settings, options.rows, max(options.nodes))
    cells: list[Cell] = []
    for temperature in options.temperatures:
        asking = Asking(options.max_tokens, temperature, options.ignore_eos)
        for mask in masks_of(settings, options.masks):
            for nodes in options.nodes:
                cells.append(replay_cell(target, questions, asking, (mask, nodes, options.rows)))
                print(f"temperature {temperature:g} {mask} {nodes}: {cells[-1].lengths(True)['all']}", file=sys.stderr)
    tasks = [*dict.fromkeys(question.task for question in questions), "all"]
    for temperature in options.temperatures:
        print_cells([cell for cell in cells if cell.temperature == temperature], tasks)
    different = num_different(cells)
    print(f"\nanswers that are not those of the first cell at their temperature: {different}")
    return {"cells": [_cell_record(cell) for cell in cells], "different_texts": different}, 1 if different else 0


def print_cells(cells: Sequence[Cell], tasks: Sequence[str]) -> None:
    """The two tables of one temperature."""
    num_looping = sum(is_looping(answer.tokens) for answer in cells[0].answers)
    num_answers = len(cells[0].answers)
    titles = {True: f"all {num_answers} answers", False: f"without the {num_looping} that loop"}
    for with_loops, title in (
        titles.items() if num_looping else [(True, f"all {num_answers} answers, none of them loops")]
    ):
        rows = []
        for cell in cells:
            lengths = [cell.lengths(with_loops)[task] for task in tasks]
            texts = ["-" if length is None else f"{length:.2f}" for length in lengths]
            rows.append([cell.mask, str(cell.max_nodes), *texts])
        print(f"\nacceptance length, temperature {cells[0].temperature:g}, {title}")
        print(grid(["sources", "nodes", *tasks], rows), flush=True)


def _cell_record(cell: Cell) -> dict[str, Any]:
    return {
        "sources": cell.mask,
        "nodes": cell.max_nodes,
        "temperature": cell.temperature,
        "all": cell.lengths(True),
        "without_loops": cell.lengths(False),
        "looping": sum(is_looping(answer.tokens) for answer in cell.answers),
        "shares": cell.counts.shares(),
    }


# ---- effort


def run_effort(options: argparse.Namespace, words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The record and the exit code."""
    from tests.bench.real_replay import SPECULATOR, Asking, EffortArms, Target, median_speeds

    sizes = {concurrency: max(concurrency, options.per_turn) for concurrency in options.concurrency}
    num_questions = options.rounds * max(sizes.values())
    groups = groups_of(options, -(-num_questions // len(options.tasks)))
    questions = [question for group in groups for question in group]
    target = Target(settings_of(words), max(options.concurrency), max(options.fixed))
    arms = EffortArms(target, options.fixed, Asking(options.max_tokens, ignore_eos=options.ignore_eos))
    record: dict[str, Any] = {}
    rows, num_different = [], 0
    for concurrency, size in sizes.items():
        speeds, different = arms.measure(concurrency, _turns(questions, size, options.rounds))
        num_different += different
        found, medians = against_best(speeds, SPECULATOR), median_speeds(speeds)
        rows.append([str(concurrency), *(f"{speed:.1f}" for speed in medians.values()), found.best, str(found.ratio)])
        interval = [round(value, 4) for value in (found.ratio.median, found.ratio.low, found.ratio.high)]
        record[str(concurrency)] = {"tokens_per_s": medians, "best": found.best, "ratio": interval, "rounds": speeds}
    print(grid(["c", *(f"{name} tok/s" for name in medians), "best other", "speculator / it (95 %)"], rows))
    print(f"answers that differ between arms: {num_different}")
    return {"concurrency": record, "different_texts": num_different}, 1 if num_different else 0


def _turns(questions: Sequence[Question], size: int, num_rounds: int) -> list[Sequence[Question]]:
    return [questions[number * size : (number + 1) * size] for number in range(num_rounds)]


# ---- busy


def run_busy(options: argparse.Namespace, words: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The record and the exit code."""
    counted = max(1, options.num_prompts // len(options.tasks))
    groups = groups_of(options, 3 * counted)
    shares = [[question for group in groups[at::3] for question in group] for at in range(3)]
    beside, after, timed = shares
    plan = real_busy.Plan(beside, after, timed, options.beside_s)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the servers would be left behind
    return real_busy.measure(words, {"max_tokens": options.max_tokens}, plan, options.starts), 0


# ---- the command line


def parser() -> argparse.ArgumentParser:
    """Of what stands before `--`."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--prompts", type=Path, default=SHARED / "prompts" / "spec_bench", help="folder of question.jsonl")
    add("--tasks", nargs="+", choices=TASKS, default=SPEC_BENCH, help="[Spec-Bench's six]")
    add("--seed", type=int, default=1, help="chooses the prompts [%(default)s]")
    add("--max-tokens", type=int, default=128, help="tokens of an answer at most [%(default)s]")
    add("--ignore-eos", action="store_true", help="answers of full length")
    add("--completions", nargs="+", choices=TASKS, default=(), help="tasks asked as plain text, not as a chat [none]")
    add("--cut-chars", type=int, default=0, help="keep the first characters of a prompt, for small contexts [all]")
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = whole.add_subparsers(dest="mode", required=True)
    names = ("http", "replay", "effort", "busy")
    http, replay, effort, busy = (modes.add_parser(name, parents=[common]) for name in names)
    http.add_argument("--per-task", type=int, default=20, help="prompts of a task at each concurrency [%(default)s]")
    http.add_argument("--rounds", type=int, default=5, help="over which these are dealt [%(default)s]")
    http.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8])
    http.add_argument("--url", default="", help="of a running server, with /v1 [one is started]")
    http.add_argument("--api-keys", nargs=2, default=("", ""), metavar=("OFF", "ON"), help="two tenants of that server")
    http.add_argument("--llama-server", default="", metavar="PROGRAM", help="llama.cpp's server, on the same GGUF file")
    http.add_argument("--llama-flags", nargs="+", default=_LLAMA_FLAGS, help="an arm for each text %(default)s")
    replay.add_argument("--per-task", type=int, default=20, help="prompts of a task [%(default)s]")
    replay.add_argument("--rows", type=int, default=8, help="answers that are written at once [%(default)s]")
    replay.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 64], help="of a tree, root included")
    replay.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    masks = ("trigram", "suffix", "ctc", "hybrid-no-head", "hybrid")
    replay.add_argument("--masks", nargs="+", choices=masks, default=masks, help="[all that there is a head for]")
    effort.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    effort.add_argument("--rounds", type=int, default=8, help="[%(default)s]")
    effort.add_argument("--per-turn", type=int, default=6, help="prompts of a turn, at least c [%(default)s]")
    effort.add_argument("--fixed", type=int, nargs="+", default=[4, 8, 16, 32], help="nodes of the fixed trees")
    busy.add_argument("--starts", type=int, default=10, help="servers started beside busy programs [%(default)s]")
    busy.add_argument("--beside-s", type=float, default=120.0, help="seconds each is used beside them [%(default)s]")
    busy.add_argument("--num-prompts", type=int, default=12, help="that both arms are timed on [%(default)s]")
    return whole


def main() -> int:
    """Run the mode of the command line."""
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words = sys.argv[place + 1 :]
    whole = parser()
    options = whole.parse_args(sys.argv[1:place])
    if options.mode == "http" and options.url and options.api_keys[0] == options.api_keys[1]:
        whole.error("--api-keys: --url needs two different ones, or what is asked with speculation off helps it on")
    run = {"http": run_http, "replay": run_replay, "effort": run_effort, "busy": run_busy}[options.mode]
    try:
        model = "" if options.mode == "http" and options.url else Path(settings_of(words).model).name
        record, code = run(options, words)
    except StartupError as error:
        whole.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        return 130
    about = {"bench": f"real_models {options.mode}", "model": model, "tasks": list(options.tasks), "seed": options.seed}
    print(json.dumps({**about, "max_tokens": options.max_tokens, **record}))
    return code


if __name__ == "__main__":
    sys.exit(main())
