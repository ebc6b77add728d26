"""`foretoken build-trigram`: a corpus table for the tri-gram drafter, from files or from the target's own answers."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from drafters.ngram.table import TableError, TableInfo
from server.config import Settings, SettingsError
from server.gguf import resolve
from server.model_files import locate, read
from training.corpus_reader import CorpusStats, check_names, read_documents
from training.flags import add_shared, check_limits
from training.ngram_table import BuildOptions, build_table
from training.prompts import AnswerPrompt, corpus_prompts
from training.text import TextEncoder

_LIMITS = {
    "top_k": (1, 255), "min_count": (1, 2**31), "min_long_count": (0, 2**31), "max_memory_mib": (1, 2**20),
    "max_tokens": (1, 2**20), "generate": (0, 2**31), "seed": (0, 2**31),
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
    add("--max-memory-mib", type=int, default=512, metavar="MIB", help="about what counting takes, no hard bound [512]")
    add("--generate", type=int, default=0, metavar="N", help="have the model write at most N answers of its own")
    add("--seed", type=int, default=1, help="of --generate [%(default)s]")
    add_shared(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the table and print what went into it."""
    if not arguments.data and not arguments.generate:
        raise SettingsError("nothing to learn from: pass --data FILES, --generate N, or both")
    check_limits(arguments, _LIMITS)
    arguments.model = resolve(arguments.model)
    encoder = TextEncoder(read(locate(arguments.model, arguments.revision)))
    files, out, stats = [Path(file) for file in arguments.data], Path(arguments.out), CorpusStats()
    check_names(files)
    found = chain.from_iterable(read_documents(path, arguments.separator, stats, encoder.whole_chat) for path in files)
    bar = tqdm(encoder.encode_each(found), "corpus", unit=" documents", disable=arguments.quiet)
    left_out: Counter[str] = Counter()  # answers by why
    answers = _answers(arguments, encoder, left_out) if arguments.generate else iter(())
    names = ("top_k", "min_count", "min_long_count", "max_memory_mib")
    limits = {name: getattr(arguments, name) for name in names}
    options = BuildOptions(out=out, tokenizer=Path(arguments.model).name, **limits)
    try:
        info = build_table(options, encoder.vocab, chain(bar, answers))
    except TableError as error:
        hint = "".join(f" ({reason})" for reason in [*stats.malformed, *left_out][:1])
        raise SettingsError(f"{error}{hint}") from error
    if arguments.generate:
        num_answers = info.num_documents - stats.num_documents
        print(f"answers       {num_answers:,} written, {arguments.generate - num_answers:,} left out")
        print("".join(f"  {count:,}: {reason}\n" for reason, count in left_out.items()), end="")
    print("\n".join(_lines(info, stats, out)))
    return 0


def _answers(arguments: argparse.Namespace, encoder: TextEncoder, left_out: Counter[str]) -> Iterator[list[int]]:
    """The target's answers, each behind the two prompt tokens that its first tri-grams need.

    They are asked for as `train-ctc` asks; without a corpus, for the continuation of an empty text. Those that a table
    cannot take are counted in `left_out`. Raises, before anything is counted: StartupError for a target that cannot be
    loaded, SettingsError where there is nothing to ask.
    """
    from training.answer_writer import AnswerWriter, load_target  # here: without --generate nobody waits for torch

    count, files = arguments.generate, [Path(file) for file in arguments.data]
    if files:
        prompts, _ = corpus_prompts(files, encoder, count, arguments.separator, arguments.seed)
    elif encoder.bos_id is not None:
        prompts = [AnswerPrompt((encoder.bos_id,), 1.0, number) for number in range(count)]
    else:
        raise SettingsError("--generate: this tokenizer has no token that starts a text: pass --data FILES to ask")
    settings = Settings(model=arguments.model, revision=arguments.revision)
    target = load_target(settings, len(prompts), arguments.max_tokens)
    writer = AnswerWriter(target, max_tokens=arguments.max_tokens, eos_ids=encoder.eos_ids, first_seed=arguments.seed)
    asked = [number for number, prompt in enumerate(prompts) if writer.has_room(prompt)]
    last = max(encoder.vocab.values())

    def token_streams() -> Iterator[list[int]]:
        for answer in tqdm(writer.write(prompts, asked), "answers", len(asked), disable=arguments.quiet):
            # The rows of a padded vocabulary are drawn too, seldom.
            if answer.error or max(answer.tokens, default=0) > last:
                left_out[answer.error or "a token that the tokenizer lacks"] += 1
            else:
                yield [*prompts[answer.number].tokens[-2:], *answer.tokens]

    return token_streams()


def _lines(info: TableInfo, stats: CorpusStats, out: Path) -> list[str]:
    lines = [
        f"documents     {info.num_documents:,}",
        f"tokens        {info.num_tokens:,}",
        f"contexts      {info.num_bigrams:,} of one token, {info.num_contexts:,} of two, "
        f"{info.num_long_contexts:,} of three",
        f"successors    {info.num_entries:,} (at most {info.top_k} a context)",
        f"table         {out}, {out.stat().st_size / 2**20:.2f} MiB, for tokenizer {info.tokenizer}",
    ]
    if stats.num_malformed:
        lines.append(f"malformed     {stats.num_malformed} lines left out:")
        lines += [f"  {line}" for line in stats.malformed]
    return lines
