"""Text of streamed tokens: a function of the ids alone, whole characters at once, stop strings held back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from server.decoders import Decoding
from server.detokenize import Detokenizer, TokenText
from server.errors import StartupError
from tests.api.model_folder import END, byte_tokenizer

SHARED = Path(os.environ.get("FORETOKEN_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
WORDS = ["▁", "▁Hello", "▁the", "lo", "é", "€", "a", "b", "▁▁", "<0x4G>", "x\ufffd", "##ing", "##", "lo</w>"]
WORDS += ["a</w>b", "</w>", "<pad>", "|", " .", "aa", "Ġthe", " ", "  a ", "\n", " n't", "a\n b"]
SPECIALS = ("<unk>", "<s>", "</s>")
FIRST_BYTE = len(SPECIALS)
FIRST_WORD = FIRST_BYTE + 256


def tokenizer_of(decoder: decoders.Decoder | None) -> Tokenizer:
    """Three special tokens, 256 byte tokens, words that any decoder may find hard, and two added tokens."""
    texts = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.add_tokens(["日本 語", "<think>"])
    return tokenizer


def word(text: str) -> int:
    return FIRST_WORD + WORDS.index(text)


def sequence(*parts: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence(list(parts))


LLAMA = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
DECODERS = {
    "none": None,
    "byte-level, fused": sequence(decoders.ByteLevel(), decoders.Fuse()),
    "byte-level of replaced": sequence(decoders.Replace("▁", "Ġ"), decoders.ByteLevel()),
    "byte-level of words": sequence(decoders.BPEDecoder(), decoders.ByteLevel()),
    "byte fallback": sequence(*LLAMA),
    "byte fallback, strip": sequence(*LLAMA, decoders.Strip(" ", 1, 0)),
    "byte fallback, not fused": sequence(decoders.ByteFallback(), decoders.Metaspace()),
    "byte fallback, replace": sequence(*LLAMA, decoders.Replace("  ", " ")),
    "byte fallback, line starts": sequence(*LLAMA, decoders.Replace(Regex("^ "), "")),
    "text start": sequence(decoders.Fuse(), decoders.Replace(Regex("\\A<0x41>"), "")),
    "metaspace": decoders.Metaspace(),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "word pieces": decoders.WordPiece(),
    "word pieces, not clean": sequence(decoders.WordPiece(cleanup=False), decoders.Strip(" ", 1, 0)),
    "ends of words": decoders.BPEDecoder(),
    "ends of words, fused": sequence(decoders.BPEDecoder(), decoders.Fuse(), decoders.Strip(" ", 1, 0)),
    "ctc": decoders.CTC(),
    "strip": decoders.Strip(" ", 1, 0),
    "strip both ends": sequence(decoders.Fuse(), decoders.Strip("a", 2, 1)),
    "replace": decoders.Replace("a", "bb"),
    "replace in all": sequence(decoders.Fuse(), decoders.Replace("aa", "b")),
    "pattern": decoders.Replace(Regex("^[ab]"), "X"),
    "pattern in all": sequence(decoders.Fuse(), decoders.Replace(Regex("[ab]+"), "-")),
    "nested": sequence(decoders.Replace("▁", " "), sequence(decoders.ByteFallback(), decoders.Fuse())),
}
TOKENIZERS = {"byte-level": byte_tokenizer()} | {name: tokenizer_of(decoder) for name, decoder in DECODERS.items()}
TEXTS = {name: TokenText(tokenizer) for name, tokenizer in TOKENIZERS.items()}
NUM_CASES = 100
"""For each decoder: 2,500 in all."""


def stream(text: TokenText, ids: list[int], cuts: list[int]) -> list[str]:
    """The pieces of an answer that arrives in groups of the given sizes."""
    detokenizer = Detokenizer(text.reader())
    pieces, start = [], 0
    for size in [*cuts, len(ids)]:
        pieces.append(detokenizer.feed(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.finish()]


def random_ids(name: str, random: Random) -> list[int]:
    """Words, characters in bytes, and in every other text parts of characters and ids that the vocabulary has not."""
    size = TOKENIZERS[name].get_vocab_size()
    first_byte = 0 if name == "byte-level" else FIRST_BYTE
    has_parts = random.random() < 0.5
    ids: list[int] = []
    for _ in range(random.randrange(40)):
        kind = random.random()
        if kind < 0.3:
            ids += [first_byte + byte for byte in random.choice(" A€🙂\n").encode()]
        elif kind < 0.8 or not has_parts:
            ids.append(random.choice([0, 1, *range(size - 33, size)]))
        else:
            ids.append(random.randrange(size + 3))
    return ids


def cases(name: str) -> Iterator[tuple[list[int], list[int], Random]]:
    """Ids and cuts, from seeds."""
    for seed in range(NUM_CASES):
        random = Random(f"{name} {seed}")
        yield random_ids(name, random), [random.randint(1, 5) for _ in range(random.randrange(20))], random


def library_text(name: str, ids: list[int]) -> str | None:
    """What the library says; None where it loses characters, or breaks."""
    if name == "strip both ends":
        return None  # it panics when both ends meet
    text = str(TOKENIZERS[name].decode(ids))
    return text if name == "byte-level" or "\ufffd" not in text.replace("x\ufffd", "x") else None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_a_function_of_the_ids(name: str) -> None:
    num_compared = 0
    for ids, cuts, _ in cases(name):
        whole = "".join(stream(TEXTS[name], ids, []))
        assert "".join(stream(TEXTS[name], ids, cuts)) == whole
        right = library_text(name, ids)
        num_compared += right is not None
        assert right is None or whole == right
    assert num_compared > NUM_CASES / 10 or name == "strip both ends"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_goes_on_with_the_text_of_its_prompt(name: str) -> None:
    for ids, _, random in cases(name):
        cut = random.randrange(len(ids) + 1)
        reader = TEXTS[name].reader(ids[:cut])
        answer = reader.feed(ids[cut:]) + reader.finish()
        if name != "pattern in all":
            assert TEXTS[name].read_prompt(ids[:cut]) + answer == "".join(stream(TEXTS[name], ids, []))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_grouping_does_not_matter_for_stop_strings(name: str) -> None:
    for ids, cuts, random in cases(name):
        stop = tuple(random.sample(["a", "ab", "lo", " the", "é", "\ufffd", "🙂"], random.randint(1, 3)))
        outcomes = []
        for sizes in (cuts, [1] * len(ids)):
            detokenizer = Detokenizer(TEXTS[name].reader(), stop)
            out, start = [], 0
            for size in [*sizes, len(ids)]:
                out.append(detokenizer.feed(ids[start : start + size]))
                start += size
            out.append(detokenizer.finish())
            outcomes.append(("".join(out), detokenizer.num_tokens, detokenizer.is_stopped))
        assert outcomes[0] == outcomes[1]
        whole = "".join(stream(TEXTS[name], ids, []))
        found = [whole.find(text) for text in stop if text in whole]
        assert outcomes[0][2] == bool(found)
        assert outcomes[0][0] == (whole[: min(found)] if found else whole)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_two_tokens_have_one_name(name: str) -> None:
    text = TEXTS[name]
    names = [text.name(token) for token in range(TOKENIZERS[name].get_vocab_size() + 3)]
    assert len(set(names)) == len(names)
    assert all(names)


JOINED = ("byte-level", "byte fallback, strip", "byte fallback, not fused", "metaspace", "word pieces", "none")


@pytest.mark.parametrize("name", JOINED)
def test_the_bytes_of_tokens_are_those_of_the_text(name: str) -> None:
    for ids, _, _ in cases(name):
        reader = TEXTS[name].reader([*b"lo"] if name == "byte-level" else [word("lo")])
        text = reader.feed(ids) + reader.finish()
        assert b"".join(map(TEXTS[name].spell, ids)).decode(errors="replace") == text


def test_characters_come_whole() -> None:
    text = "né €uro 🙂 ok"
    pieces = stream(TEXTS["byte-level"], list(text.encode()), [1] * 40)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_unfinished_character_is_told_at_the_end() -> None:
    assert stream(TEXTS["byte-level"], [*b"a", 0xE2, 0x82], [1, 1, 1]) == ["a", "", "", "", "\ufffd"]


BYTES = {name: 0 if name == "byte-level" else FIRST_BYTE for name in ("byte-level", "byte fallback, not fused")}
BYTES |= dict.fromkeys(("byte fallback", "byte fallback, strip", "byte fallback, line starts"), FIRST_BYTE)


@pytest.mark.parametrize("name", BYTES)
def test_characters_leave_at_once_inside_a_run_of_bytes(name: str) -> None:
    ids = [BYTES[name] + byte for byte in "🙂€🙂".encode()]
    assert stream(TEXTS[name], ids, [1] * 11) == ["", "", "", "🙂", "", "", "€", "", "", "", "🙂", "", ""]


@pytest.mark.parametrize("name", BYTES)
def test_a_cut_character_costs_no_other(name: str) -> None:
    ids = [BYTES[name] + byte for byte in "🙂🙂🙂".encode()]
    assert "".join(stream(TEXTS[name], ids[:10], [1] * 10)) == "🙂🙂\ufffd"
    assert "".join(stream(TEXTS[name], ids[1:], [1] * 10)) == "\ufffd\ufffd\ufffd🙂🙂"


@pytest.mark.parametrize("name", BYTES)
def test_an_answer_ends_the_character_that_its_prompt_began(name: str) -> None:
    face = [BYTES[name] + byte for byte in "🙂".encode()]
    prompt = [*face, *face[:3]]
    assert TEXTS[name].read_prompt(prompt) == "🙂"
    reader = TEXTS[name].reader(prompt * 20)
    assert [reader.feed(face[3:]), reader.feed(face), reader.finish()] == ["🙂", "🙂", ""]


def test_letters_of_added_tokens_are_no_bytes() -> None:
    tokenizer = byte_tokenizer()
    words = ["señor", "đem", "日本 語", "<think>"]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in words])
    text = TokenText(tokenizer)
    for added in words:
        ids = tokenizer.encode(added).ids
        assert len(ids) == 1
        assert "".join(stream(text, [*b"a ", *ids, *b" b"], [1] * 9)) == f"a {added} b"
        assert (text.name(ids[0]), text.spell(ids[0])) == (added, added.encode())


def test_an_added_token_is_decoded_like_others_where_decoders_replace() -> None:
    """Some vocabularies list their runs of spaces as added tokens."""
    tokenizer = tokenizer_of(DECODERS["byte fallback"])
    tokenizer.add_tokens([AddedToken("▁▁▁", special=False, normalized=False)])
    text = TokenText(tokenizer)
    token = tokenizer.token_to_id("▁▁▁")
    assert "".join(stream(text, [word("a"), token, word("a")], [])) == tokenizer.decode([word("a"), token, word("a")])
    assert text.name(token) == "   "


def test_a_pattern_for_all_text_gives_nothing_of_the_prompt_to_the_answer() -> None:
    text = TEXTS["pattern in all"]
    prompt = [word("a"), word("é")]
    assert text.read_prompt(prompt) == "-é"
    reader = text.reader(prompt)
    assert reader.feed([word("b")]) + reader.finish() == "-"


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(StartupError, match="'Rot13'"):
        Decoding({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Rot13"}]})


def test_special_tokens_are_not_text() -> None:
    assert "".join(stream(TEXTS["byte-level"], [*b"a", END, *b"b"], [])) == "ab"


def test_continued_text_keeps_its_space() -> None:
    the = word("▁the")
    text = TEXTS["byte fallback, strip"]
    assert text.reader().feed([the]) == "the"
    assert text.reader([1]).feed([the]) == "the"
    assert text.reader([1, the]).feed([the]) == " the"
    spaced = TEXTS["metaspace"]
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


def test_a_stop_string_of_special_tokens() -> None:
    """Such a token is not shown, but a client that sends its name as a stop string means it."""
    ids = [*b"a", END - 1, *b"\nb", END - 1, *b"\ncd"]
    cases = [
        (("<|system|>",), "a", 2),
        (("<|system|>\n",), "a", 3),
        (("a<|system|>\n",), "", 3),
        (("\nb<|system|>",), "a", 5),
        (("<|system|>\nc",), "a\nb", 7),
        (("<|system|>\nc", "d"), "a\nb", 7),
        (("<|end|>", "\nb\nc"), "a", 7),
        (("<|system|><|system|>",), "a\nb\ncd", 8),
    ]
    for stop, sent, num_tokens in cases:
        for size in (1, 2, 8):
            detokenizer = Detokenizer(TEXTS["byte-level"].reader(), stop)
            pieces = [detokenizer.feed(ids[start : start + size]) for start in range(0, len(ids), size)]
            assert "".join(pieces) + detokenizer.finish() == sent, stop
            assert (detokenizer.num_tokens, detokenizer.length) == (num_tokens, len(sent)), stop
    kept = Detokenizer(TEXTS["byte-level"].reader(), ("<|system|>\n",), keeps_stop=True)
    assert kept.feed(ids) == "a\n"


def test_stop_strings_in_a_run_of_bytes() -> None:
    """Found at the token that completes it: the run goes on, and nothing of it is counted."""
    face = [FIRST_BYTE + byte for byte in "🙂".encode()]
    detokenizer = Detokenizer(TEXTS["byte fallback, strip"].reader(), ("🙂🙂",))
    assert detokenizer.feed(face * 5) == ""
    assert (detokenizer.num_tokens, detokenizer.is_stopped) == (8, True)


def test_names_and_bytes_of_tokens() -> None:
    text = TEXTS["byte-level"]
    assert (text.name(0xE2), text.spell(0xE2)) == ("bytes:\\xe2", b"\xe2")
    assert (text.name(END), text.spell(END)) == ("<|end|>", b"")
    assert (text.name(9999), text.spell(9999)) == ("token_id:9999", b"")
    text = TEXTS["byte fallback, strip"]
    the, letter, byte = word("▁the"), word("a"), FIRST_BYTE + 0x61
    assert (text.name(the), text.spell(the)) == (" the", b" the")
    assert (text.name(letter), text.spell(letter)) == ("a", b"a")
    assert (text.name(byte), text.spell(byte)) == ("bytes:\\x61", b"a")
    assert text.name(FIRST_BYTE + 0x41) == "A"  # no other token says so


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
        right = tokenizer.decode(ids)
        assert "\ufffd" in right or "".join(stream(text, ids, cuts)) == right

    check()
