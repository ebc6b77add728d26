"""Text of streamed tokens: the same as in one call, whole characters only, stop strings held back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from server.detokenize import Detokenizer, TokenText
from tests.api.model_folder import END, byte_tokenizer

SHARED = Path(os.environ.get("FORETOKEN_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
WORDS = ["▁", "▁Hello", "▁the", "lo", "é", "€", "a", "b", "▁▁", "<0x4G>", "x\ufffd"]


def fallback_tokenizer(*, strips: bool) -> Tokenizer:
    """As llama's: <unk>, <s>, </s>, 256 byte tokens, some words."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strips else parts)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """A decoder without a byte rule here: read through a window."""
    vocab = {text: index for index, text in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "</s>")])
    return tokenizer


def added_text_tokenizer() -> Tokenizer:
    """Byte-level, with ordinary added tokens whose text is no byte spelling."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("日本 語", special=False)])
    return tokenizer


def fused_tokenizer() -> Tokenizer:
    """Bytes again, but by a decoder that is read through a window."""
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


TOKENIZERS = {
    "byte-level in a window": fused_tokenizer(),
    "byte-level": byte_tokenizer(),
    "byte-level with added text": added_text_tokenizer(),
    "byte fallback, strip": fallback_tokenizer(strips=True),
    "byte fallback": fallback_tokenizer(strips=False),
    "metaspace": metaspace_tokenizer(),
}
TEXTS = {name: TokenText(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def stream(text: TokenText, ids: list[int], cuts: list[int]) -> list[str]:
    """The pieces of an answer that arrives in groups of the given sizes."""
    detokenizer = Detokenizer(text.reader())
    pieces, start = [], 0
    for size in [*cuts, len(ids)]:
        pieces.append(detokenizer.feed(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.finish()]


def token_ids(name: str) -> st.SearchStrategy[list[int]]:
    size = TOKENIZERS[name].get_vocab_size()
    end = size + 3  # ids that the model has and the vocabulary has not
    few = st.sampled_from([0, 1, 2, size - 1, size - 2, *"€".encode(), *(3 + byte for byte in "€é".encode())])
    return st.lists(st.one_of(few, st.integers(0, end - 1)).filter(lambda token: token < end), max_size=40)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_one_call(name: str, data: st.DataObject) -> None:
    ids = data.draw(token_ids(name))
    cuts = data.draw(st.lists(st.integers(1, 5), max_size=12))
    assert "".join(stream(TEXTS[name], ids, cuts)) == TOKENIZERS[name].decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_grouping_does_not_matter(name: str, data: st.DataObject) -> None:
    ids = data.draw(token_ids(name))
    stop = data.draw(st.lists(st.sampled_from(["a", "ab", "lo", " the", "é", "\ufffd"]), min_size=1, max_size=3))
    cuts = data.draw(st.lists(st.integers(1, 5), max_size=12))
    outcomes = []
    for sizes in (cuts, [1] * len(ids)):
        detokenizer = Detokenizer(TEXTS[name].reader(), tuple(stop))
        out, start = [], 0
        for size in [*sizes, len(ids)]:
            out.append(detokenizer.feed(ids[start : start + size]))
            start += size
        out.append(detokenizer.finish())
        outcomes.append(("".join(out), detokenizer.num_tokens, detokenizer.is_stopped))
    assert outcomes[0] == outcomes[1]
    whole = TOKENIZERS[name].decode(ids)
    found = [whole.find(text) for text in stop if text in whole]
    assert outcomes[0][2] == bool(found)
    assert outcomes[0][0] == (whole[: min(found)] if found else whole)


def test_characters_come_whole() -> None:
    text = "né €uro 🙂 ok"
    pieces = stream(TEXTS["byte-level"], list(text.encode()), [1] * 40)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_unfinished_character_is_told_at_the_end() -> None:
    assert stream(TEXTS["byte-level"], [*b"a", 0xE2, 0x82], [1, 1, 1]) == ["a", "", "", "", "\ufffd"]


RUNS = st.lists(st.sampled_from([0x80, 0xFF, 0xE2, 0x82, 0xAC, 0xF0, 0x9F]), min_size=16, max_size=80)


@settings(max_examples=200, deadline=None)
@given(RUNS, st.sampled_from([[], [*b"a"], [*"€🙂".encode()]]), st.lists(st.integers(1, 20), max_size=12))
def test_long_undecodable_runs_equal_one_call(run: list[int], end: list[int], cuts: list[int]) -> None:
    ids = [*b"ok", *run, *end]
    assert "".join(stream(TEXTS["byte-level in a window"], ids, cuts)) == bytes(ids).decode(errors="replace")


class Counting:
    """A tokenizer that notes how many tokens it is shown."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.sizes: list[int] = []

    def decode(self, ids: list[int]) -> str:
        self.sizes.append(len(ids))
        return str(self.tokenizer.decode(ids))


@pytest.mark.parametrize(("name", "token"), [("byte-level in a window", 0x80), ("metaspace", 2 + len(WORDS) - 1)])
def test_a_long_undecodable_run_is_read_once(name: str, token: int) -> None:
    reader = TEXTS[name].reader()
    counting = reader._tokenizer = Counting(TOKENIZERS[name])  # type: ignore[attr-defined]
    text = "".join(reader.feed([token]) for _ in range(500)) + reader.finish()
    assert text == TOKENIZERS[name].decode([token] * 500)
    assert max(counting.sizes) < 40


def test_byte_run_is_held_until_it_is_certain() -> None:
    euro = [3 + byte for byte in "€".encode()]
    word = 3 + 256 + WORDS.index("a")
    pieces = stream(TEXTS["byte fallback"], [*euro, word], [1, 1, 1, 1])
    assert pieces == ["", "", "", "€a", "", ""]


def test_special_tokens_are_not_text() -> None:
    assert "".join(stream(TEXTS["byte-level"], [*b"a", END, *b"b"], [])) == "ab"


def test_continued_text_keeps_its_space() -> None:
    the = 3 + 256 + WORDS.index("▁the")
    text = TEXTS["byte fallback, strip"]
    assert text.reader().feed([the]) == "the"
    assert text.reader([1]).feed([the]) == "the"
    assert text.reader([1, the]).feed([the]) == " the"
    spaced = TEXTS["metaspace"]
    the = 2 + WORDS.index("▁the")
    assert spaced.reader().feed([the]) == "the"
    assert spaced.reader([the]).feed([the]) == " the"


@pytest.mark.parametrize(
    ("stop", "sent"),
    [
        (("lo w",), "hel"),
        (("world", "o"), "hell"),
        (("xyz",), "hello world"),
        (("d",), "hello worl"),
        (("hello world!",), "hello world"),
        (("h",), ""),
    ],
)
def test_stop_strings(stop: tuple[str, ...], sent: str) -> None:
    detokenizer = Detokenizer(TEXTS["byte-level"].reader(), stop)
    out = "".join(detokenizer.feed([byte]) for byte in b"hello world") + detokenizer.finish()
    assert out == sent
    assert detokenizer.length == len(sent)


def test_nothing_of_a_stop_string_leaks() -> None:
    detokenizer = Detokenizer(TEXTS["byte-level"].reader(), ("STOP",))
    assert [detokenizer.feed([byte]) for byte in b"aSTSTOPb"] == ["a", "", "", "ST", "", "", "", ""]
    assert detokenizer.is_stopped
    assert detokenizer.num_tokens == 7


def test_kept_stop_string_and_min_tokens() -> None:
    kept = Detokenizer(TEXTS["byte-level"].reader(), ("ll",), keeps_stop=True)
    assert kept.feed(list(b"hello")) == "hell"
    patient = Detokenizer(TEXTS["byte-level"].reader(), ("l",), min_tokens=4)
    assert patient.feed(list(b"hello fly")) == "hello f"
    assert patient.num_tokens == 8


def test_bytes_of_a_token() -> None:
    assert TEXTS["byte-level"].spell(0xE2) == b"\xe2"
    assert TEXTS["byte-level"].spell(END) == b"<|end|>"
    assert TEXTS["byte fallback"].spell(3 + 0x41) == b"A"
    assert TEXTS["byte fallback"].spell(3 + 256 + WORDS.index("▁the")) == b" the"
    assert TEXTS["byte-level"].spell(9999) == b""


@pytest.mark.parametrize("model", ["booking5m", "tiny1m"])
def test_real_tokenizers(model: str) -> None:
    path = SHARED / "models" / model / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"shared model {model} is not here")
    tokenizer = Tokenizer.from_file(str(path))
    text = TokenText(tokenizer)
    size = tokenizer.get_vocab_size()

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=60), st.lists(st.integers(1, 5), max_size=20))
    def check(ids: list[int], cuts: list[int]) -> None:
        assert "".join(stream(text, ids, cuts)) == tokenizer.decode(ids)

    check()
