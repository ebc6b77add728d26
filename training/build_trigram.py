"""`foretoken build-trigram`: a corpus table for the tri-gram drafter, from files or from the target's own answers."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from drafters.trigram.table import TableError
from server.commands.bench_prompts import read_prompts
from server.config import Settings, SettingsError
from server.model_files import locate, read
from training.answers import Answers, Writing, pays_to_compile
from training.ngram_table import BuildOptions, BuildStats, build_table
from training.text import TextEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken build-trigram`."""
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub id whose tokenizer the table is for")
    add("--revision", default="", help="branch, tag or commit of a Hub model")
    add("--data", nargs="+", default=[], metavar="FILE", help=".txt or .jsonl (text, messages, prompt/completion)")
    add("--out", required=True, metavar="TABLE", help="file to write")
    add("--top-k", type=int, default=12, metavar="K", help="successors kept for each context [%(default)s]")
    add("--min-count", type=int, default=1, metavar="N", help="leave out contexts seen less often [%(default)s]")
    add("--min-long-count", type=int, default=2, metavar="N", help="the same for contexts of three tokens; 0: none [2]")
    add("--separator", default="<|endoftext|>", help="parts the documents of a .txt file [%(default)s]")
    add("--max-memory-mib", type=int, default=512, metavar="MIB", help="bound on the counting buffers [%(default)s]")
    add("--generate", type=int, default=0, metavar="N", help="have the model write N answers of its own as well")
    add("--prompts", default="", metavar="FILE", help="what --generate asks, as in bench [the bare start of a text]")
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer of --generate [%(default)s]")
    add("--temperature", type=float, default=1.0, help="of --generate [%(default)s]")
    add("--seed", type=int, default=1, help="seed of the first answer; the next one adds 1 [%(default)s]")
    add("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Build the table and print what went into it."""
    if not arguments.data and not arguments.generate:
        raise SettingsError("nothing to learn from: pass --data FILES, --generate N, or both")
    limits = [("top-k", 1, 255), ("min-count", 1, 2**31), ("max-memory-mib", 1, 2**20), ("max-tokens", 1, 2**20)]
    for name, low, high in [*limits, ("generate", 0, 2**31), ("min-long-count", 0, 2**31)]:
        value = getattr(arguments, name.replace("-", "_"))
        if not low <= value <= high:
            raise SettingsError(f"--{name}: must be {low} to {high}, got {value}")
    if not 0.0 <= arguments.temperature <= 2.0:
        raise SettingsError(f"--temperature: must be 0 to 2, got {arguments.temperature}")
    reader = TextEncoder(read(locate(arguments.model, arguments.revision)))
    options = BuildOptions(
        files=tuple(Path(file) for file in arguments.data),
        out=Path(arguments.out),
        tokenizer=Path(arguments.model).name,
        top_k=arguments.top_k,
        min_count=arguments.min_count,
        min_long_count=arguments.min_long_count,
        separator=arguments.separator,
        max_memory_mib=arguments.max_memory_mib,
        shows_progress=not arguments.quiet,
    )
    try:
        with _answers(arguments, reader) if arguments.generate else nullcontext(()) as streams:
            stats = build_table(options, reader.encode, reader.vocab, render=reader.render, token_streams=streams)
    except TableError as error:
        raise SettingsError(str(error)) from error
    print("\n".join(_lines(stats, options.out)))
    return 0


def _lines(stats: BuildStats, out: Path) -> list[str]:
    info = stats.info
    lines = [
        f"documents     {info.num_documents:,}",
        f"tokens        {info.num_tokens:,}",
        f"contexts      {info.num_bigrams:,} of one token, {info.num_contexts:,} of two, "
        f"{info.num_long_contexts:,} of three",
        f"successors    {info.num_entries:,} (at most {info.top_k} a context)",
        f"table         {out}, {stats.file_bytes / 2**20:.2f} MiB, for tokenizer {info.tokenizer}",
    ]
    if stats.num_spilled_runs:
        lines.append(f"spilled       {stats.num_spilled_runs} sorted runs")
    if stats.num_malformed:
        lines.append(f"malformed     {stats.num_malformed} lines left out:")
        lines += [f"  {line}" for line in stats.malformed]
    return lines


def _answers(arguments: argparse.Namespace, reader: TextEncoder) -> Answers:
    if arguments.prompts:
        prompts = tuple(tuple(reader.prompt_ids(prompt)) for prompt in read_prompts(arguments.prompts))
    elif reader.bos_id is not None:
        prompts = ((reader.bos_id,),)
    else:
        raise SettingsError("--generate: this tokenizer has no token that starts a text: pass --prompts FILE")
    writing = Writing(
        prompts, arguments.generate, arguments.max_tokens, arguments.temperature, arguments.seed, reader.eos_ids
    )
    pays = pays_to_compile(arguments.generate, arguments.max_tokens)
    settings = Settings(model=arguments.model, revision=arguments.revision, drafter="none", compile=pays)
    return Answers(settings, writing, shows_progress=not arguments.quiet)
