"""`foretoken build-trigram`: a corpus table for the tri-gram drafter, from files or from the target's own answers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from drafters.ngram.table import TableError
from server.commands.bench_prompts import read_prompts
from server.config import Settings, SettingsError
from server.errors import InvalidRequest
from server.gguf import resolve
from server.model_files import locate, read
from training.flags import add_shared, check_limits
from training.ngram_table import BuildOptions, BuildStats, build_table
from training.prompts import AnswerPrompt
from training.text import TextEncoder

_LIMITS = {
    "top_k": (1, 255), "min_count": (1, 2**31), "min_long_count": (0, 2**31), "max_memory_mib": (1, 2**20),
    "max_tokens": (1, 2**20), "generate": (0, 2**31), "temperature": (0, 2),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken build-trigram`."""
    add = parser.add_argument
    add("--model", required=True, help="folder, GGUF file or Hub id whose tokenizer the table is for")
    add("--data", nargs="+", default=[], metavar="FILE", help=".txt or .jsonl (text, messages, prompt/completion)")
    add("--out", required=True, metavar="TABLE", help="file to write")
    add("--top-k", type=int, default=12, metavar="K", help="successors kept for each context [%(default)s]")
    add("--min-count", type=int, default=1, metavar="N", help="leave out contexts seen less often [%(default)s]")
    add("--min-long-count", type=int, default=2, metavar="N", help="the same for contexts of three tokens; 0: none [2]")
    add("--max-memory-mib", type=int, default=512, metavar="MIB", help="bound on the counting buffers [%(default)s]")
    add("--generate", type=int, default=0, metavar="N", help="have the model write N answers of its own as well")
    add("--prompts", default="", metavar="FILE", help="what --generate asks, as in bench [the bare start of a text]")
    add("--temperature", type=float, default=1.0, help="of --generate [%(default)s]")
    add("--seed", type=int, default=1, help="seed of the first answer; the next one adds 1 [%(default)s]")
    add_shared(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the table and print what went into it."""
    if not arguments.data and not arguments.generate:
        raise SettingsError("nothing to learn from: pass --data FILES, --generate N, or both")
    check_limits(arguments, _LIMITS)
    arguments.model = resolve(arguments.model)
    encoder = TextEncoder(read(locate(arguments.model, arguments.revision)))
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
    answers = _answers(arguments, encoder) if arguments.generate else ()
    try:
        stats = build_table(options, encoder.encode, encoder.vocab, render=encoder.render, token_streams=answers)
    except TableError as error:
        raise SettingsError(str(error)) from error
    print("\n".join(_lines(stats, options.out)))
    return 0


def _answers(arguments: argparse.Namespace, encoder: TextEncoder) -> Iterator[list[int]]:
    """Answers of the target, each behind the two prompt tokens that its first tri-grams need.

    Raises, before anything is counted: SettingsError for a prompt that cannot be answered, StartupError for a target
    that cannot be loaded; while answers are written: SettingsError if one fails.
    """
    from training.answer_writer import AnswerWriter, load_target  # here: without --generate nobody waits for torch

    texts = _prompt_ids(arguments.prompts, encoder)
    settings = Settings(model=arguments.model, revision=arguments.revision)
    target = load_target(settings, arguments.generate, arguments.max_tokens)
    writer = AnswerWriter(target, max_tokens=arguments.max_tokens, eos_ids=encoder.eos_ids, first_seed=arguments.seed)
    numbers = range(arguments.generate)
    prompts = [AnswerPrompt(texts[number % len(texts)], arguments.temperature, number) for number in numbers]
    for number, prompt in enumerate(prompts[: len(texts)], 1):
        if not prompt.tokens:
            raise SettingsError(f"--prompts: prompt {number} is empty")
        if writer.room(prompt) < 1:
            size = len(prompt.tokens)
            raise SettingsError(
                f"--prompts: prompt {number} has {size} tokens, which leaves no room for an answer in the model's "
                f"context of {writer.room(prompt) + size}"
            )

    def token_streams() -> Iterator[list[int]]:
        for answer in tqdm(writer.write(prompts, numbers), "answers", len(prompts), disable=arguments.quiet):
            if answer.error:
                raise SettingsError(f"--generate: {answer.error}")
            yield [*prompts[answer.number].tokens[-2:], *answer.tokens]

    return token_streams()


def _prompt_ids(file: str, encoder: TextEncoder) -> list[tuple[int, ...]]:
    """The prompts of --prompts as token ids, or the bare start of a text. Raises: SettingsError."""
    if not file:
        if encoder.bos_id is None:
            raise SettingsError("--generate: this tokenizer has no token that starts a text: pass --prompts FILE")
        return [(encoder.bos_id,)]
    found = []
    for prompt in read_prompts(file):
        if prompt.messages and not encoder.has_chat_template:
            raise SettingsError("--prompts: holds chat messages, and the model has no chat template")
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        try:
            found.append(tuple(encoder.chat_ids(messages) if messages else encoder.encode([prompt.text])[0]))
        except InvalidRequest as error:
            raise SettingsError(f"--prompts: {error.message}") from error
    return found


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
    if stats.num_spills:
        lines.append(f"spilled       {stats.num_spills} times")
    if stats.corpus.num_malformed:
        lines.append(f"malformed     {stats.corpus.num_malformed} lines left out:")
        lines += [f"  {line}" for line in stats.corpus.malformed]
    return lines
