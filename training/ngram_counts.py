"""Building the corpus table: documents to tokens to counts to one file, in bounded memory.

Counting follows ADED's tri-gram table (arXiv 2407.12021: successors of every pair of tokens, pruned to the most
probable ones), with bi-gram and uni-gram rows added for back-off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from drafters.ngram.table import (
    LONG_CONTEXT,
    MAX_VOCAB,
    TableError,
    TableInfo,
    long_context_keys,
    tokenizer_fingerprint,
)
from training.corpus_reader import Reading, Render, check_names, join_messages, read_documents
from training.counting import RunCounter
from training.table_writer import TableWriter

Encode = Callable[[list[str]], list[list[int]]]
_KEY_BITS = 20
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build a table from, and how compact it shall be."""

    files: tuple[Path, ...]
    out: Path
    tokenizer: str
    """Name written into the header, for people."""
    top_k: int = 12
    """Successors kept per context (ADED keeps 12)."""
    min_count: int = 1
    """Contexts of two tokens seen less often are left out: raise it to make the table of a large corpus smaller."""
    min_long_count: int = 2
    """The same for contexts of three tokens; 0 leaves these out, which is ADED's plain tri-gram table."""
    separator: str = "<|endoftext|>"
    """Parts the documents of a .txt file."""
    max_memory_mib: int = 512
    """Bound on the counting buffers; what does not fit is spilled next to `out`."""
    shows_progress: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildStats:
    """What a build read and wrote."""

    info: TableInfo
    file_bytes: int
    num_spilled_runs: int
    num_malformed: int
    malformed: tuple[str, ...]
    """The first malformed lines as "file:line: reason"."""


def build_table(
    options: BuildOptions,
    encode: Encode,
    vocab: dict[str, int],
    *,
    render: Render | None = None,
    token_streams: Iterable[Sequence[int]] = (),
) -> BuildStats:
    """Build a table and put it in place in one move: `options.out` is either the old file or the whole new one.

    Args:
        encode: texts to token ids, as the target reads them (special tokens included), in batches.
        vocab: the tokenizer's whole vocabulary, added tokens too: it names the table and bounds its ids.
        render: chat messages to text, by the model's chat template; without one their contents are joined.
        token_streams: token ids of documents that need no encoding, such as answers of the target itself.
    Raises: TableError with one clear line (unusable input, empty corpus, full disk).
    """
    if not 1 <= options.top_k <= 255:
        raise TableError(f"top_k must be 1 to 255, not {options.top_k}")
    vocab_size = max(vocab.values(), default=-1) + 1
    if not 0 < vocab_size <= MAX_VOCAB:
        raise TableError(f"a vocabulary of {vocab_size} tokens cannot be tabled: the limit is {MAX_VOCAB}")
    check_names(list(options.files))
    reading = Reading()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{options.out.name}-", dir=options.out.parent) as folder:
            counts = _Counts(Path(folder), vocab_size, options)
            documents = _encoded(options, encode, render or join_messages, reading)
            for encoded in documents:
                counts.add(encoded)
            for tokens in token_streams:
                reading.num_documents += 1
                counts.add(tokens)
            _check_enough(counts, options, reading)
            writer = TableWriter(Path(folder), options.top_k)
            _write_counts(writer, counts, options)
            info = writer.finish(
                options.out,
                fingerprint=tokenizer_fingerprint(vocab),
                tokenizer=options.tokenizer,
                num_tokens=counts.num_tokens,
                num_documents=reading.num_documents,
            )
            return BuildStats(
                info=info,
                file_bytes=options.out.stat().st_size,
                num_spilled_runs=counts.num_runs,
                num_malformed=reading.num_malformed,
                malformed=tuple(reading.malformed),
            )
    except OSError as error:
        raise TableError(f"{options.out}: cannot write the tri-gram table: {error.strerror or error}") from error


class _Counts:
    """Uni-, bi- and tri-gram counts of a token stream. Owns the counters."""

    def __init__(self, folder: Path, vocab_size: int, options: BuildOptions):
        # Sorting a run holds about three times the buffer; tri- and four-grams get half of the room each.
        keys = max(4096, options.max_memory_mib * 2**20 // (8 * 4 * 2))
        self.block_keys = max(4096, keys // 4)
        self.unigrams = np.zeros(vocab_size, np.int64)  # [V]
        self.bigrams = RunCounter(folder, "bi", max(4096, keys // 8))
        self.trigrams = RunCounter(folder, "tri", keys)
        self.fourgrams = RunCounter(folder, "four", keys) if options.min_long_count else None
        self.num_tokens = 0

    @property
    def num_runs(self) -> int:
        counters = (self.bigrams, self.trigrams, self.fourgrams)
        return sum(counter.num_runs for counter in counters if counter is not None)

    def add(self, document: Sequence[int]) -> None:
        """Count one document; no n-gram crosses its ends."""
        tokens = np.asarray(document, np.int64)
        if not tokens.size:
            return
        if tokens.min() < 0 or tokens.max() >= self.unigrams.size:
            raise TableError(f"a document holds token id {tokens.max()}, the vocabulary ends at {self.unigrams.size}")
        self.num_tokens += int(tokens.size)
        self.unigrams += np.bincount(tokens, minlength=self.unigrams.size)
        ids = tokens.astype(np.uint64)
        bits = np.uint64(_KEY_BITS)
        pairs = ids[:-1] << bits | ids[1:]
        self.bigrams.add(pairs)
        self.trigrams.add(pairs[:-1] << bits | ids[2:])
        if self.fourgrams is not None and ids.size > 3:
            # A context of three tokens is hashed to 44 bits: with its successor it fills the 64 of a key.
            contexts = long_context_keys(pairs[:-2], ids[2:-1]) ^ np.uint64(LONG_CONTEXT)
            self.fourgrams.add(contexts << bits | ids[3:])


def _encoded(options: BuildOptions, encode: Encode, render: Render, reading: Reading) -> Iterator[list[int]]:
    total = sum(path.stat().st_size for path in options.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="corpus", disable=not options.shows_progress) as bar:
        for path in options.files:
            documents = read_documents(path, render, options.separator, reading)
            while batch := list(islice(documents, _BATCH_DOCUMENTS)):
                yield from encode(batch)
                bar.update(reading.num_bytes - bar.n)


def _check_enough(counts: _Counts, options: BuildOptions, reading: Reading) -> None:
    if counts.num_tokens:
        return
    names = ", ".join(str(path) for path in options.files) or "no files"
    if reading.malformed:
        raise TableError(f"no usable line in the corpus; {reading.malformed[0]} ({reading.num_malformed} malformed)")
    raise TableError(f"the corpus is empty: {names}")


def _write_counts(writer: TableWriter, counts: _Counts, options: BuildOptions) -> None:
    writer.add_unigrams(counts.unigrams)
    mask = np.uint64((1 << _KEY_BITS) - 1)
    bits = np.uint64(_KEY_BITS)
    bi_rows = np.zeros(counts.unigrams.size, np.uint64)
    for contexts, tokens, seen in _whole_contexts(counts.bigrams, counts.block_keys, bits, mask):
        kept, rows = writer.add_rows(contexts, tokens, seen, 1)
        bi_rows[kept.astype(np.int64)] = rows
    writer.set_bigrams(bi_rows)
    for contexts, tokens, seen in _whole_contexts(counts.trigrams, counts.block_keys, bits, mask):
        kept, rows = writer.add_rows(contexts, tokens, seen, options.min_count)
        writer.add_contexts(kept + np.uint64(1), rows)
    if counts.fourgrams is None:
        return
    for contexts, tokens, seen in _whole_contexts(counts.fourgrams, counts.block_keys, bits, mask):
        kept, rows = writer.add_rows(contexts, tokens, seen, options.min_long_count)
        writer.add_contexts(kept | np.uint64(LONG_CONTEXT), rows, are_long=True)


def _whole_contexts(
    counter: RunCounter, block_keys: int, bits: np.uint64, mask: np.uint64
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]]:
    """Blocks of (context, token, count) that never part a context."""
    held: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None
    for block in counter.merged(block_keys):
        keys, seen = block if held is None else (np.concatenate(pair) for pair in zip(held, block, strict=True))
        if not keys.size:
            continue
        contexts = keys >> bits
        start = int(np.searchsorted(contexts, contexts[-1]))
        held = keys[start:], seen[start:]
        if start:
            yield contexts[:start], keys[:start] & mask, seen[:start]
    if held is not None:
        yield held[0] >> bits, held[0] & mask, held[1]
