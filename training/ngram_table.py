"""Building the corpus table: documents of tokens to counts to one file, in bounded memory.

Counting follows ADED's tri-gram table (arXiv 2407.12021: successors of every pair of tokens, pruned to the most
probable ones), with bi-gram and uni-gram rows added for back-off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from drafters.ngram.table import (
    LONG_CONTEXT,
    MAX_VOCAB,
    TableError,
    TableInfo,
    long_context_keys,
    tokenizer_fingerprint,
)
from training.table_writer import Ngrams, TableWriter, Uint64

Uint32 = NDArray[np.uint32]

_END = np.uint32(2**32 - 1)
"""Behind each document in the file of tokens: no n-gram crosses it."""
_TOKEN_BITS = np.uint64(20)
"""A key is `context << 20 | token`: a vocabulary of a million, and 44 bits for the context."""
_KEY_BYTES = 64
"""About what counting takes for each token at its peak: a key, its count, and sorting both."""
_SLICE = 2**20
"""Tokens whose n-grams are made at a time."""
_HASH = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the high bits of a product with it are well mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """Where a table goes, and how compact it shall be."""

    out: Path
    tokenizer: str
    """Name written into the header, for people."""
    top_k: int = 12
    """Successors kept per context, at most 255 (ADED keeps 12)."""
    min_count: int = 1
    """Contexts of two tokens seen less often are left out: raise it to make the table of a large corpus smaller."""
    min_long_count: int = 2
    """The same for contexts of three tokens; 0 leaves these out, which is ADED's plain tri-gram table."""
    max_memory_mib: int = 512
    """About what counting takes, no hard bound: a corpus that needs more is counted part by part, which is slower."""


def build_table(options: BuildOptions, vocab: dict[str, int], documents: Iterable[Sequence[int]]) -> TableInfo:
    """Build a table and put it in place in one move: `options.out` is either the old file or the whole new one.

    Args:
        vocab: the tokenizer's whole vocabulary, added tokens too: it names the table and bounds its ids.
        documents: token ids, as the target reads them (special tokens included). They are kept next to `out`, 4 bytes
            a token, until they are counted.
    Raises: TableError with one clear line (unusable ids, empty corpus, full disk).
    """
    vocab_size = max(vocab.values(), default=-1) + 1
    if not 0 < vocab_size <= MAX_VOCAB:
        raise TableError(f"a vocabulary of {vocab_size} tokens cannot be tabled: the limit is {MAX_VOCAB}")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{options.out.name}-", dir=options.out.parent) as folder:
            kept, draft = Path(folder) / "tokens", Path(folder) / "table"
            num_documents, counts = _keep(documents, kept, vocab_size)
            tokens: Uint32 = np.memmap(kept, np.uint32, "r")
            writer = TableWriter(vocab_size, options.top_k)
            writer.add_unigrams(counts)
            for length, least in ((1, 1), (2, options.min_count), (3, options.min_long_count)):
                for ngrams in count_ngrams(tokens, length, options.max_memory_mib * 2**20) if least else ():
                    writer.add_contexts(ngrams, length, least)
            return writer.write(
                options.out,
                draft,
                fingerprint=tokenizer_fingerprint(vocab),
                tokenizer=options.tokenizer[:500],
                num_tokens=int(counts.sum()),
                num_documents=num_documents,
            )
    except OSError as error:
        raise TableError(f"{options.out}: cannot write the tri-gram table: {error.strerror or error}") from error


def _keep(documents: Iterable[Sequence[int]], path: Path, vocab_size: int) -> tuple[int, NDArray[np.int64]]:
    """Write the tokens of all documents to a file. Returns: how many documents, and how often each token stood [V]."""
    num_documents, counts = 0, np.zeros(vocab_size, np.int64)
    with path.open("wb") as file:
        for document in documents:
            tokens = np.asarray(document, np.int64)
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
                raise TableError(f"a document holds token id {tokens.max()}, the vocabulary ends at {vocab_size}")
            num_documents += 1
            counts += np.bincount(tokens, minlength=vocab_size)
            file.write(np.append(tokens.astype(np.uint32), _END).data)
    if not counts.any():
        raise TableError("the corpus is empty")
    return num_documents, counts


def count_ngrams(tokens: Uint32, length: int, max_bytes: int) -> Iterator[Ngrams]:
    """All n-grams of a context of 1 to 3 tokens and a successor, part by part; a context is in one part only.

    Args: `tokens` [n] of all documents; `max_bytes`: about what a part takes, if contexts spread evenly.
    """
    num_parts = np.uint64(tokens.size * _KEY_BYTES // max(max_bytes, 2**16) + 1)
    for part in range(int(num_parts)):
        found, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for first in range(0, tokens.size, _SLICE):
            keys = _keys(tokens[first : first + _SLICE + length], length)
            is_ours = ((keys >> _TOKEN_BITS) * _HASH >> np.uint64(32)) % num_parts == part
            distinct, num_seen = np.unique(keys[is_ours], return_counts=True)
            found.append(distinct)
            counts.append(num_seen)
        keys, places = np.unique(np.concatenate(found), return_inverse=True)
        sums = np.bincount(places, np.concatenate(counts), keys.size).astype(np.uint64)
        if keys.size:
            yield keys >> _TOKEN_BITS, keys & ((np.uint64(1) << _TOKEN_BITS) - np.uint64(1)), sums


def _keys(tokens: Uint32, length: int) -> Uint64:
    """The n-grams of `length` + 1 tokens that lie within a document. A context of three tokens is hashed to 44 bits."""
    if tokens.size <= length:
        return np.zeros(0, np.uint64)
    spans = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    spans = spans[(spans != _END).all(1)].astype(np.uint64)
    contexts: Uint64 = spans[:, 0]
    if length > 1:
        contexts = contexts << _TOKEN_BITS | spans[:, 1]
    if length > 2:
        contexts = long_context_keys(contexts, spans[:, 2]) ^ np.uint64(LONG_CONTEXT)
    keys: Uint64 = contexts << _TOKEN_BITS | spans[:, -1]
    return keys
