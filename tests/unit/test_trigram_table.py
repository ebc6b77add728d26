"""The corpus table: readers, counting in bounded memory, the file and its errors."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from drafters.ngram.table import Table, TableError, find_row, long_context_key, tokenizer_fingerprint
from server.config import SettingsError
from tests.tables import bigram_successors, successors
from training import corpus_reader, ngram_table, table_writer
from training.corpus_reader import PIECE_CHARS, CorpusStats, join_messages, read_documents
from training.ngram_table import BuildOptions, build_table, count_ngrams

VOCAB = {chr(97 + index): index for index in range(26)} | {" ": 26}


def encode(texts):
    return [[VOCAB[char] for char in text if char in VOCAB] for text in texts]


def build(tmp_path, documents, **options):
    return build_table(BuildOptions(out=tmp_path / "t.tri", tokenizer="letters", **options), VOCAB, documents)


def read_all(path, separator="<|endoftext|>", shape=join_messages):
    stats = CorpusStats()
    return list(read_documents(path, separator, stats, shape)), stats


def expected(documents, order):
    counts = defaultdict(Counter)
    for tokens in documents:
        for index in range(order, len(tokens)):
            counts[tuple(tokens[index - order : index])][tokens[index]] += 1
    return counts


def assert_row(found, counter, top_k):
    total = counter.total()
    kept = [(token, count / total) for token, count in counter.most_common() if round(count / total * 4095)]
    assert len(found) == min(top_k, len(kept))
    assert np.allclose([share for _, share in found], [share for _, share in kept[:top_k]], atol=2e-4)
    assert all(abs(share - counter[token] / total) < 2e-4 for token, share in found)


@pytest.mark.parametrize("memory", [512, 0])
def test_rows_are_the_pruned_counts_in_one_part_or_many(tmp_path, memory):
    chooser = random.Random(1)
    documents = [[int(chooser.triangular(0, 26, 3)) for _ in range(chooser.randrange(1, 400))] for _ in range(60)]
    info = build(tmp_path, iter([*documents, []]), top_k=5, max_memory_mib=memory)
    table = Table.open(tmp_path / "t.tri", tokenizer_fingerprint(VOCAB))
    pairs, triples = expected(documents, 2), expected(documents, 3)
    assert info.num_contexts == len(pairs)
    assert info.num_documents == 61
    assert info.num_tokens == sum(map(len, documents))
    for context, counter in pairs.items():
        assert_row(successors(table, *context), counter, 5)
    for (token,), counter in expected(documents, 1).items():
        assert_row(bigram_successors(table, token), counter, 5)
    often = {context: counter for context, counter in triples.items() if counter.total() >= 2}
    assert info.num_long_contexts == len(often)
    assert all(find_row(table.corpus[0], long_context_key(*context)) for context in often)
    rare = next(context for context, counter in triples.items() if counter.total() == 1)
    assert not find_row(table.corpus[0], long_context_key(*rare))
    assert successors(table, 25, 25) == []


@pytest.mark.parametrize("max_bytes", [2**16, 2**30])
def test_every_ngram_within_a_document_is_counted_once(monkeypatch, max_bytes):
    monkeypatch.setattr(ngram_table, "_SLICE", 501)
    chooser = np.random.default_rng(0)
    documents = [chooser.integers(0, 9, size) for size in chooser.integers(0, 80, 500)]
    tokens = np.concatenate([np.append(document, 2**32 - 1) for document in documents]).astype(np.uint32)
    found, seen, num_parts = Counter(), Counter(), 0
    for contexts, successors_, counts in count_ngrams(tokens, 2, max_bytes):
        num_parts += 1
        assert (np.diff(contexts.astype(np.int64)) >= 0).all()
        seen.update(set(contexts.tolist()))
        for context, token, count in zip(contexts.tolist(), successors_.tolist(), counts.tolist(), strict=True):
            found[(context >> 20, context & 0xFFFFF), token] += count
    assert (num_parts > 3) == (max_bytes == 2**16)
    assert set(seen.values()) == {1}, "a context is in one part"
    wanted = {
        (context, token): count for context, row in expected(documents, 2).items() for token, count in row.items()
    }
    assert found == wanted


def test_contexts_below_the_minimum_are_left_out(tmp_path):
    info = build(tmp_path, [[1, 2, 3], [1, 2, 4], [5, 6, 7]], min_count=2, min_long_count=0)
    table = Table.open(tmp_path / "t.tri")
    assert info.num_contexts == 1
    assert info.num_long_contexts == 0
    assert {token for token, _ in successors(table, 1, 2)} == {3, 4}
    assert successors(table, 5, 6) == []


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    text = "ab cd<|endoftext|>\nef\n<|endoftext|>"
    rows = [
        {"text": "ab cd"},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]},
        {"prompt": "ab ", "completion": "cd"},
        {
            "prompt": [{"role": "user", "content": "ab"}],
            "completion": [{"role": "assistant", "content": "cd"}],
        },
    ]
    lines = "\n".join(map(json.dumps, rows)).encode() + b"\n"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    for name in ("a.txt", "a.txt.gz"):
        found, stats = read_all(tmp_path / name)
        assert found == ["ab cd", "ef"]
        assert (stats.num_documents, stats.num_malformed) == (2, 0)
    found, stats = read_all(tmp_path / "a.jsonl.xz", shape=lambda m: "|".join(x["role"] for x in m))
    assert found == ["ab cd", "user|assistant", "ab cd", "user|assistant"]
    assert (stats.num_documents, stats.num_malformed) == (4, 0)
    assert read_all(tmp_path / "a.jsonl.xz", shape=list)[0][1] == rows[1]["messages"]


def test_a_text_without_marks_is_read_in_pieces(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 40_000 + "\n" + "line\n" * 40_000)
    sizes = [len(text) for text in read_all(tmp_path / "long.txt", "")[0]]
    assert len(sizes) > 2
    assert sum(sizes) > 390_000
    assert max(sizes[1:]) <= PIECE_CHARS + 5


def test_a_character_may_lie_across_two_pieces_of_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_reader, "MAX_LINE_CHARS", 3)
    (tmp_path / "w.txt").write_text("wörld €\n€€")
    assert read_all(tmp_path / "w.txt", "")[0] == ["wörld €\n€€"]


def test_malformed_lines_are_counted_and_named(tmp_path):
    bad = ['{"text": 3}', "not json", '{"other": "x"}', "[1]", '{"messages": [{"role": "user"}]}', '{"messages": []}']
    bad.append('{"text": "\\ud800"}')
    lines = '{"text": "abcabc"}\n\n' + "\n".join(bad) + "\n"
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b'{"text": "\xff"}\n{"text": "abc"}')
    found, stats = read_all(tmp_path / "m.jsonl")
    assert found == ["abcabc", "abc"]
    assert stats.num_malformed == len(bad) + 1
    assert [line.split(":")[1] for line in stats.malformed] == ["3", "4", "5", "6", "7", "8", "9", "10"]
    assert "m.jsonl:3: " in stats.malformed[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"fine\nna\xefve\n", r"x\.txt: not UTF-8 .*: convert it"),
        ("x.txt", b"fine\ncut \xe2\x82", r"x\.txt: not UTF-8 "),
        ("x.txt.gz", gzip.compress("wide".encode("utf-16")), r"x\.txt\.gz: not UTF-8 "),
        ("x.txt.gz", b"not gzip", r"x\.txt\.gz: cannot read"),
        ("x.txt.xz", lzma.compress(b"abc" * 1000)[:-20], r"x\.txt\.xz: cannot read"),
    ],
)
def test_unusable_input_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=f"^--data: .*{message}") as caught:
        read_all(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"^--data: .*none\.txt: no such file"):
        corpus_reader.check_names([tmp_path / "none.txt"])
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(SettingsError, match=r"x\.csv: a corpus file is \.txt or \.jsonl"):
        corpus_reader.check_names([tmp_path / "x.csv"])


@pytest.mark.parametrize(("documents", "message"), [([[1, 27]], "token id 27"), ([[], []], "empty"), ([], "empty")])
def test_documents_that_make_no_table_leave_nothing(tmp_path, documents, message):
    with pytest.raises(TableError, match=message):
        build(tmp_path, documents)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_table_and_nothing_else(tmp_path, monkeypatch):
    build(tmp_path, [[1, 2, 3]])
    before = (tmp_path / "t.tri").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(table_writer.os, "fsync", full)
        with pytest.raises(TableError, match=r"t\.tri: cannot write .*No space left on device"):
            build(tmp_path, [[4, 5, 6]])
    assert [file.name for file in tmp_path.iterdir()] == ["t.tri"]
    assert (tmp_path / "t.tri").read_bytes() == before


def test_broken_tables_are_refused(tmp_path):
    build(tmp_path, [[1, 2, 3, 4, 5]] * 3)
    path = tmp_path / "t.tri"
    good = path.read_bytes()
    with pytest.raises(TableError, match="built for the tokenizer of 'letters'"):
        Table.open(path, tokenizer_fingerprint({"x": 0}))
    for content, message in (
        (good[:-64], "cut short"),
        (good[:100], "cut short"),
        (good[:5], "not a tri-gram table"),
        (b"", "not a tri-gram table"),
        (b"PK" + good[2:], "not a tri-gram table"),
        (good[:8] + b"\x09" + good[9:], "version 9, this program reads version 1"),
        (good.replace(b'"vocab_size": 27', b'"vocab_size": 28'), "does not fit"),
    ):
        path.write_bytes(content)
        with pytest.raises(TableError, match=message):
            Table.open(path)
    with pytest.raises(TableError, match="cannot read"):
        Table.open(tmp_path / "missing.tri")


def test_fingerprint_tells_tokenizers_apart_and_ignores_order():
    assert tokenizer_fingerprint(VOCAB) == tokenizer_fingerprint(dict(reversed(VOCAB.items())))
    assert tokenizer_fingerprint(VOCAB) != tokenizer_fingerprint(VOCAB | {"é": 27})
    assert tokenizer_fingerprint({"a": 0, "b": 1}) != tokenizer_fingerprint({"a": 1, "b": 0})
