"""Corpus tables read in plain Python."""

from __future__ import annotations

from drafters.ngram.table import PROBABILITY_BITS, PROBABILITY_UNITS, Corpus, Table, context_key, find_row

Entries = list[tuple[int, float]]
"""Tokens with their probabilities, best first."""


def successors(table: Table, first: int, second: int) -> Entries:
    """Tokens that followed (first, second) in the corpus."""
    return entries_of(table.corpus, int(find_row(table.corpus[0], context_key(first, second))))


def bigram_successors(table: Table, token: int) -> Entries:
    """Tokens that followed `token` in the corpus."""
    return entries_of(table.corpus, int(table.corpus[1][token]))


def entries_of(corpus: Corpus, row: int) -> Entries:
    """Of a packed row."""
    start, length = row >> 16, row >> 8 & 255
    entries = corpus[3][start : start + length].tolist()
    return [(entry >> PROBABILITY_BITS, (entry & PROBABILITY_UNITS) / PROBABILITY_UNITS) for entry in entries]
