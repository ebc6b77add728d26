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
from tqdm import tqdm

from drafters.ngram.table import (
    LONG_CONTEXT,
    MAX_VOCAB,
    TableError,
    TableInfo,
    long_context_keys,
    tokenizer_fingerprint,
)
from training.corpus_reader import CorpusStats, Render, check_names, join_messages, read_documents
from training.ngram_counter import TOKEN_BITS, NgramCounter
from training.table_writer import TableWriter

Encode = Callable[[list[str]], list[list[int]]]
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
    num_spills: int
    """How often the counting buffers ran full."""
    corpus: CorpusStats


def build_table(
    options: BuildOptions,
    encode: Encode,
    vocab: dict[str, int],
    *,
    render: Render = join_messages,
    token_streams: Iterable[Sequence[int]] = (),
) -> BuildStats:
    """Build a table and put it in place in one move: `options.out` is either the old file or the whole new one.

    Args:
        encode: texts to token ids, as the target reads them (special tokens included), in batches.
        vocab: the tokenizer's whole vocabulary, added tokens too: it names the table and bounds its ids.
        render: chat messages to text, by the model's chat template.
        token_streams: token ids of documents that need no encoding, such as answers of the target itself.
    Raises: TableError with one clear line (unusable input, empty corpus, full disk).
    """
    if not 1 <= options.top_k <= 255:
        raise TableError(f"top_k must be 1 to 255, not {options.top_k}")
    vocab_size = max(vocab.values(), default=-1) + 1
    if not 0 < vocab_size <= MAX_VOCAB:
        raise TableError(f"a vocabulary of {vocab_size} tokens cannot be tabled: the limit is {MAX_VOCAB}")
    check_names(options.files)
    stats = CorpusStats()
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{options.out.name}-", dir=options.out.parent) as folder:
            counts = _Counts(Path(folder), vocab_size, options)
            for document in _encoded(options, encode, render, stats):
                counts.add(document)
            for stream in token_streams:
                stats.num_documents += 1
                counts.add(stream)
            _check_enough(counts, options, stats)
            info = counts.table().write(
                options.out,
                Path(folder) / "table",
                fingerprint=tokenizer_fingerprint(vocab),
                tokenizer=options.tokenizer[:500],
                num_tokens=counts.num_tokens,
                num_documents=stats.num_documents,
            )
            file_bytes = options.out.stat().st_size
    except OSError as error:
        raise TableError(f"{options.out}: cannot write the tri-gram table: {error.strerror or error}") from error
    return BuildStats(info=info, file_bytes=file_bytes, num_spills=counts.num_spills, corpus=stats)


class _Counts:
    """Counts of the n-grams of one to four tokens. Owns the counters."""

    def __init__(self, folder: Path, vocab_size: int, options: BuildOptions) -> None:
        self._options = options
        # Sorting takes about three times the buffer; tri- and four-grams get half of the room each.
        keys = max(4096, options.max_memory_mib * 2**20 // (8 * 4 * 2))
        self._unigrams = np.zeros(vocab_size, np.int64)  # [V]
        self._bigrams = NgramCounter(folder, "bi", max(4096, keys // 8))
        self._trigrams = NgramCounter(folder, "tri", keys)
        self._fourgrams = NgramCounter(folder, "four", keys)
        self.num_tokens = 0

    @property
    def num_spills(self) -> int:
        return sum(counter.num_spills for counter in (self._bigrams, self._trigrams, self._fourgrams))

    def add(self, document: Sequence[int]) -> None:
        """Count one document; no n-gram crosses its ends."""
        tokens = np.asarray(document, np.int64)
        if not tokens.size:
            return
        if tokens.min() < 0 or tokens.max() >= self._unigrams.size:
            raise TableError(f"a document holds token id {tokens.max()}, the vocabulary ends at {self._unigrams.size}")
        self.num_tokens += int(tokens.size)
        self._unigrams += np.bincount(tokens, minlength=self._unigrams.size)
        ids = tokens.astype(np.uint64)
        pairs = ids[:-1] << TOKEN_BITS | ids[1:]
        self._bigrams.add(pairs)
        self._trigrams.add(pairs[:-1] << TOKEN_BITS | ids[2:])
        if self._options.min_long_count and ids.size > 3:
            # A context of three tokens is hashed to 44 bits: with its successor it fills the 64 of a key.
            contexts = long_context_keys(pairs[:-2], ids[2:-1]) ^ np.uint64(LONG_CONTEXT)
            self._fourgrams.add(contexts << TOKEN_BITS | ids[3:])

    def table(self) -> TableWriter:
        """The rows of a table of all that was counted."""
        writer = TableWriter(self._unigrams.size, self._options.top_k)
        writer.add_unigrams(self._unigrams)
        for ngrams in self._bigrams.counted():
            writer.add_bigrams(ngrams)
        for ngrams in self._trigrams.counted():
            writer.add_contexts(ngrams, self._options.min_count)
        for ngrams in self._fourgrams.counted():
            writer.add_contexts(ngrams, self._options.min_long_count, are_long=True)
        return writer


def _encoded(options: BuildOptions, encode: Encode, render: Render, stats: CorpusStats) -> Iterator[list[int]]:
    total = sum(path.stat().st_size for path in options.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="corpus", disable=not options.shows_progress) as bar:
        for path in options.files:
            documents = read_documents(path, render, options.separator, stats)
            while batch := list(islice(documents, _BATCH_DOCUMENTS)):
                yield from encode(batch)
                bar.update(stats.num_bytes - bar.n)


def _check_enough(counts: _Counts, options: BuildOptions, stats: CorpusStats) -> None:
    if counts.num_tokens:
        return
    if stats.malformed:
        raise TableError(f"no usable line in the corpus; {stats.malformed[0]} ({stats.num_malformed} malformed)")
    names = ", ".join(str(path) for path in options.files) or "no files"
    raise TableError(f"the corpus is empty: {names}")
