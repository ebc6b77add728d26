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
from tests.tables import bigram_successors, successors
from training import corpus_reader, table_writer
from training.corpus_reader import PIECE_CHARS, CorpusStats, join_messages, read_documents
from training.ngram_counter import NgramCounter
from training.ngram_table import BuildOptions, build_table

VOCAB = {chr(97 + index): index for index in range(26)} | {" ": 26}


def encode(texts):
    return [[VOCAB[char] for char in text if char in VOCAB] for text in texts]


def build(tmp_path, *files, **options):
    streams = options.pop("token_streams", ())
    given = BuildOptions(
        files=tuple(files), out=tmp_path / "t.tri", tokenizer="letters", shows_progress=False, **options
    )
    return build_table(given, encode, VOCAB, token_streams=streams)


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
def test_rows_are_the_pruned_counts_whether_spilled_or_not(tmp_path, memory):
    chooser = random.Random(1)
    documents = [[int(chooser.triangular(0, 26, 3)) for _ in range(chooser.randrange(1, 400))] for _ in range(60)]
    stats = build(tmp_path, token_streams=iter(documents), top_k=5, max_memory_mib=memory)
    assert (stats.num_spills > 4) == (memory == 0)
    table = Table.open(tmp_path / "t.tri", tokenizer_fingerprint(VOCAB))
    pairs, triples = expected(documents, 2), expected(documents, 3)
    assert stats.info.num_contexts == len(pairs)
    assert stats.info.num_documents == 60
    assert stats.info.num_tokens == sum(map(len, documents))
    for context, counter in pairs.items():
        assert_row(successors(table, *context), counter, 5)
    for (token,), counter in expected(documents, 1).items():
        assert_row(bigram_successors(table, token), counter, 5)
    often = {context: counter for context, counter in triples.items() if counter.total() >= 2}
    assert stats.info.num_long_contexts == len(often)
    assert all(find_row(table.corpus[0], long_context_key(*context)) for context in often)
    rare = next(context for context, counter in triples.items() if counter.total() == 1)
    assert not find_row(table.corpus[0], long_context_key(*rare))
    assert successors(table, 25, 25) == []


@pytest.mark.parametrize(("buffer_keys", "num_spills"), [(777, 25), (30_000, 0)])
def test_counter_counts_every_key_once_and_keeps_contexts_whole(tmp_path, buffer_keys, num_spills):
    chooser = np.random.default_rng(0)
    contexts, tokens = chooser.integers(0, 90, 20_000), chooser.integers(0, 7, 20_000)
    keys = (contexts << 20 | tokens).astype(np.uint64)
    counter = NgramCounter(tmp_path, "x", buffer_keys)
    for start in range(0, keys.size, 501):
        counter.add(keys[start : start + 501])
    assert counter.num_spills == num_spills
    found, seen = Counter(), Counter()
    for block in counter.counted():
        assert (np.diff(block[0].astype(np.int64)) >= 0).all()
        seen.update(set(block[0].tolist()))
        found.update({(context, token): count for context, token, count in np.stack(block, 1).tolist()})
    assert found == Counter(map(tuple, np.stack([contexts, tokens], 1).tolist()))
    assert set(seen.values()) == {1}
    assert not list(tmp_path.iterdir())


def test_contexts_below_the_minimum_are_left_out(tmp_path):
    stats = build(tmp_path, token_streams=[[1, 2, 3], [1, 2, 4], [5, 6, 7]], min_count=2, min_long_count=0)
    table = Table.open(tmp_path / "t.tri")
    assert stats.info.num_contexts == 1
    assert stats.info.num_long_contexts == 0
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
    stats = CorpusStats()
    for name in ("a.txt", "a.txt.gz"):
        found = list(read_documents(tmp_path / name, join_messages, "<|endoftext|>", stats))
        assert found == ["ab cd", "ef"]
    found = list(
        read_documents(tmp_path / "a.jsonl.xz", lambda m: "|".join(x["role"] for x in m), "<|endoftext|>", stats)
    )
    assert found == ["ab cd", "user|assistant", "ab cd", "user|assistant"]
    assert stats.num_documents == 8
    assert stats.num_malformed == 0
    assert stats.num_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_a_text_without_marks_is_read_in_pieces(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 40_000 + "\n" + "line\n" * 40_000)
    sizes = [len(text) for text in read_documents(tmp_path / "long.txt", join_messages, "", CorpusStats())]
    assert len(sizes) > 2
    assert sum(sizes) > 390_000
    assert max(sizes[1:]) <= PIECE_CHARS + 5


def test_a_character_may_lie_across_two_pieces_of_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_reader, "MAX_LINE_BYTES", 3)
    (tmp_path / "w.txt").write_text("wörld €\n€€")
    assert list(read_documents(tmp_path / "w.txt", join_messages, "", CorpusStats())) == ["wörld €\n€€"]


def test_malformed_lines_are_counted_and_named(tmp_path):
    bad = ['{"text": 3}', "not json", '{"other": "x"}', "[1]", '{"messages": [{"role": "user"}]}', '{"messages": []}']
    bad.append('{"text": "\\ud800"}')
    (tmp_path / "m.jsonl").write_text('{"text": "abcabc"}\n\n' + "\n".join(bad))
    stats = build(tmp_path, tmp_path / "m.jsonl")
    assert stats.corpus.num_malformed == len(bad)
    assert [line.split(":")[1] for line in stats.corpus.malformed] == ["3", "4", "5", "6", "7", "8", "9"]
    assert "m.jsonl:3: " in stats.corpus.malformed[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"nonsense\n", r"x\.jsonl:1: "),
        ("x.txt", b"  \n", "empty"),
        ("x.csv", b"a,b", r"\.txt or \.jsonl"),
        ("x.txt", b"fine\nna\xefve\n", r"x\.txt: not UTF-8 at byte 7 .* convert it"),
        ("x.txt", b"fine\ncut \xe2\x82", r"x\.txt: not UTF-8 at byte 9 "),
        ("x.txt.gz", gzip.compress("wide".encode("utf-16")), r"x\.txt\.gz: not UTF-8 at byte 0 "),
        ("x.txt.gz", b"not gzip", r"x\.txt\.gz: cannot read"),
        ("x.txt.xz", lzma.compress(b"abc" * 1000)[:-20], r"x\.txt\.xz: cannot read"),
    ],
)
def test_unusable_input_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=message) as caught:
        build(tmp_path, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_missing_file_and_foreign_token_ids_are_refused(tmp_path):
    with pytest.raises(TableError, match="no such file"):
        build(tmp_path, tmp_path / "none.txt")
    with pytest.raises(TableError, match="token id 27"):
        build(tmp_path, token_streams=[[1, 27]])


def test_a_full_disk_leaves_the_old_table_and_nothing_else(tmp_path, monkeypatch):
    build(tmp_path, token_streams=[[1, 2, 3]])
    before = (tmp_path / "t.tri").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(table_writer.os, "fsync", full)
        with pytest.raises(TableError, match=r"t\.tri: cannot write .*No space left on device"):
            build(tmp_path, token_streams=[[4, 5, 6]])
    assert [file.name for file in tmp_path.iterdir()] == ["t.tri"]
    assert (tmp_path / "t.tri").read_bytes() == before


def test_broken_tables_are_refused(tmp_path):
    build(tmp_path, token_streams=[[1, 2, 3, 4, 5]] * 3)
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
