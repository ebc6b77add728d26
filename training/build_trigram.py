"""`foretoken build-trigram`: a corpus table for the tri-gram drafter, from files or from the target's own answers."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from drafters.ngram.table import TableError
from server.chat_template import ChatTemplate
from server.commands.bench_prompts import Prompt, read_prompts
from server.config import Settings, SettingsError
from server.errors import InvalidRequest
from server.model_files import ModelFiles, locate, read
from server.tokenizer import end_ids, load_tokenizer
from training.answers import Answers, Writing, pays_to_compile
from training.corpus_reader import Render, join_messages
from training.ngram_counts import BuildOptions, BuildStats, build_table


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
    reader = Reader(read(locate(arguments.model, arguments.revision)))
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


class Reader:
    """Texts to token ids as the target reads them. Owns the tokenizer and the chat template."""

    def __init__(self, files: ModelFiles) -> None:
        self._tokenizer = load_tokenizer(files)
        self._bos = files.special_tokens.get("bos_token", "")
        bos_id = self._tokenizer.token_to_id(self._bos) if self._bos else None
        self.bos_id: int | None = bos_id
        # Whether a plain text begins with it is the post-processor's decision, here as in a request.
        self._adds_bos = bos_id is not None and self._tokenizer.encode("").ids[:1] == [bos_id]
        self._template = None
        self.vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eos_ids = end_ids(files, self._tokenizer)
        if files.chat_template is not None:
            self._template = ChatTemplate(files.chat_template, files.special_tokens)

    @property
    def render(self) -> Render | None:
        """Chat messages to text by the model's template; None when it has none."""
        return None if self._template is None else self._render

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of whole documents; the token that starts a text is there once."""
        return [self._start(encoding.ids) for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of one prompt. Raises SettingsError when the model cannot chat."""
        if not prompt.messages:
            return self.encode([prompt.text])[0]
        if self._template is None:
            raise SettingsError("--prompts: holds chat messages, and the model has no chat template")
        return self.chat_ids([{"role": role, "content": content} for role, content in prompt.messages])

    def chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of a chat up to the header of the assistant's turn; without a chat template, of its plain text.

        Raises: InvalidRequest when the template refuses the messages.
        """
        text = join_messages(messages) if self._template is None else self._template.render(messages)
        return self.encode([text])[0]

    def _start(self, ids: list[int]) -> list[int]:
        if self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def _render(self, messages: list[dict[str, Any]]) -> str:
        assert self._template is not None
        try:
            return self._template.render(messages, add_generation_prompt=False)
        except InvalidRequest as error:
            raise ValueError(error.message) from error


def _answers(arguments: argparse.Namespace, reader: Reader) -> Answers:
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
