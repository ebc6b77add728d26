"""A GGUF file is a model: converted once, exactly, and told in one line where it is broken."""

from __future__ import annotations

import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from gguf.constants import GGML_QUANT_SIZES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from server import gguf, gguf_child
from server.cli import main
from server.config import Settings
from server.errors import StartupError
from server.gguf import file_key, find, resolve
from server.gguf_child import convert, narrowest
from server.gguf_header import GgufError, read_header
from server.model_files import read, served_names
from server.tokenizer import end_ids, load_tokenizer
from tests.api.model_folder import END
from tests.parity.harness import greedy, make_loop, run_all, submit
from tests.tiny_gguf import CONTEXT, F16, LAYERS, TOKENS, TURN_END, write_gguf
from tests.truth import greedy_answer
from verifier.fingerprint import model_fingerprint
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.private_folder import cache_folder

TEXTS = ("the other thing", " in  the\n", "<|user|>hi<|end|>", "naïve 名", "<|turn_end|>", "")
SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def folder(file: Path, cache: Path, told: list[str]) -> Path:
    """The conversion of the file, by a process as a server has it made."""
    return Path(resolve(str(file), told.append))


@pytest.fixture(scope="module")
def truth(file: Path) -> Any:
    """The model as transformers itself loads the file."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files, with an empty cache beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# ---- what comes out


def test_weights_are_those_that_transformers_makes_of_the_file(folder: Path, truth: Any) -> None:
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    expected = truth.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_ids_and_prompts_are_those_that_transformers_makes_of_the_file(folder: Path, file: Path) -> None:
    expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    files = read(folder)
    tokenizer = load_tokenizer(files)
    assert [tokenizer.encode(text).ids for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]
    assert tokenizer.get_vocab_size() == len(TOKENS), "transformers adds <|endoftext|>, which has no embedding"
    assert files.chat_template == expected.chat_template
    assert files.special_tokens["bos_token"] == "<|bos|>"


def test_answers_are_those_of_generate_and_ends_and_context_are_the_file_s(folder: Path, truth: Any) -> None:
    files = read(folder)
    assert end_ids(files, load_tokenizer(files)) == (END, TURN_END)
    verifier = load_backend(
        VerifierOptions(model=str(folder), device="cpu", threads=1, max_rows=4, max_positions=64, is_compiled=False)
    )
    assert verifier.geometry.max_model_len == CONTEXT
    loop = make_loop(verifier, {})
    prompts = {f"p{number}": [1 + number, 50, 97 + number, 33] for number in range(4)}
    run = run_all(loop, [submit(name, ids, greedy(24), "none") for name, ids in prompts.items()])
    assert run.answers == {name: greedy_answer(truth, ids, 24)[0] for name, ids in prompts.items()}


def test_values_that_fit_into_16_bits_take_no_more() -> None:
    thirds = torch.tensor([1.0, 1 / 3])
    assert narrowest(torch.tensor([0.5, 2.0**100])).dtype == torch.bfloat16
    assert narrowest(thirds.half().float()).dtype == torch.float16
    assert torch.equal(narrowest(thirds), thirds)


def test_a_file_of_halves_becomes_a_folder_of_halves(fresh: Path) -> None:
    file = write_gguf(fresh / "halves.gguf", matrices=F16)
    gguf_child.write_folder(file, fresh / "out")
    weights = load_file(fresh / "out/model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16
    assert weights["model.embed_tokens.weight"].dtype == torch.float32, "of eight bits and a scale"


# ---- once


def test_it_is_told_named_after_the_file_and_made_once(
    folder: Path, file: Path, cache: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert told[0] == f"converting {file} (0 MB) to safetensors"
    assert told[1].startswith("converted tiny.Q4_1.gguf to safetensors in ")
    assert told[1].endswith(f" s; the next start reads {folder}")
    assert folder.is_relative_to(cache)
    assert served_names(Settings(model=str(folder))) == ("tiny.Q4_1",)
    monkeypatch.setattr(gguf, "CHILD_COMMAND", ("false",))
    assert resolve(str(file), told.append) == resolve(str(file.parent), told.append) == str(folder)
    copied = Path(shutil.copy(file, tmp_path))
    assert resolve(str(copied), told.append) == str(folder), "content counts, not where it lies"
    monkeypatch.setattr("hashlib.file_digest", None)
    assert resolve(str(file), told.append) == str(folder), "nor is it read again"
    assert len(told) == 2
    copied.write_bytes(write_gguf(tmp_path / "other", seed=1).read_bytes())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert gguf._folder_of(copied, file_key(copied)) != folder


def test_the_same_content_has_the_same_fingerprint_wherever_it_is_made(folder: Path, file: Path, fresh: Path) -> None:
    gguf_child.write_folder(file, fresh / "again")
    assert model_fingerprint(str(fresh / "again")) == model_fingerprint(str(folder))


def test_two_at_once_make_one_folder_and_clear_what_a_killed_one_left(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder, calls, together = fresh / "a.gguf", fresh / "digest/a", [], threading.Barrier(2)
    file.touch()
    (fresh / "digest/.part-old/a").mkdir(parents=True)

    def write(_: Path, part: Path) -> None:
        calls.append(part)
        part.mkdir()
        (part / "weights").write_text("whole")

    def start() -> None:
        together.wait()
        convert(file, folder, file_key(file))

    monkeypatch.setattr(gguf_child, "write_folder", write)
    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (folder / "weights").read_text() == "whole"
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "a"]


def test_a_file_that_changes_meanwhile_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(fresh / "a.gguf")
    monkeypatch.setattr(gguf_child, "write_folder", lambda _, part: part.mkdir())
    with pytest.raises(GgufError, match="written to while it was read"):
        convert(file, fresh / "digest/a", "another key")
    assert [path.name for path in (fresh / "digest").iterdir()] == [".lock"]


# ---- which file


def test_a_folder_is_a_model_by_its_only_file(file: Path, tmp_path: Path) -> None:
    assert find("") is None
    assert find("some/model") is None
    assert find(str(tmp_path)) is None
    first = Path(shutil.copy(file, tmp_path / "b.gguf"))
    assert find(str(tmp_path)) == first
    shutil.copy(file, tmp_path / "a.GGUF")
    with pytest.raises(StartupError, match=r"holds 2 GGUF files: name one of a\.GGUF, b\.gguf"):
        find(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert find(str(tmp_path)) is None, "its weights lie beside them"


def test_a_file_without_the_ending_is_known_by_its_first_bytes(file: Path, tmp_path: Path) -> None:
    assert find(shutil.copy(file, tmp_path / "blob")) == tmp_path / "blob"
    (tmp_path / "notes").write_text("GGU")
    with pytest.raises(StartupError, match="notes is neither a folder nor a GGUF file"):
        find(str(tmp_path / "notes"))
    with pytest.raises(StartupError, match=r"there is no file models/x\.gguf"):
        find("models/x.gguf")


# ---- broken files


def put(position: int, form: str, value: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        return data[:position] + struct.pack(form, value) + data[position + struct.calcsize(form) :]

    return change


def after(name: bytes, skipped: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Write over what stands so many bytes behind a name."""
    return lambda data: put(data.index(name) + len(name) + skipped, form, value)(data)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "other": (lambda data: b"PK\3\4" + data[4:], "not a GGUF file"),
    "empty": (lambda data: b"", "not a GGUF file"),
    "magic alone": (lambda data: data[:4], "ends at byte 4 and has to go on to 8"),
    "in the header": (lambda data: data[:1000], "ends at byte 1,000 and has to go on to"),
    "in the weights": (lambda data: data[:-1000], "broken, or a download that was cut off"),
    "big-endian": (put(4, ">I", 3), "big-endian"),
    "version 1": (put(4, "<I", 1), "GGUF version 1; versions 2 and 3"),
    "fields": (put(16, "<Q", 2**40), "header with 1,099,511,627,776 fields"),
    "tensors": (put(8, "<Q", 2**63), "tensors, the limit is 65,536"),
    "more fields than there are": (put(16, "<Q", 60_000), "broken"),
    "key": (put(24, "<Q", 2**62), "has to go on to"),
    "array": (
        after(b"tokenizer.ggml.tokens", 8, "<Q", 2**60),
        "'tokenizer.ggml.tokens': the arrays up to it have more than 4,194,304",
    ),
    "array past the end": (after(b"tokenizer.ggml.token_type", 8, "<Q", 4_000_000), "has to go on to"),
    "array of arrays": (
        after(b"tokenizer.ggml.tokens", 4, "<I", 9),
        "'tokenizer.ggml.tokens' holds elements of type 9",
    ),
    "field type": (
        after(b"llama.context_length", 0, "<I", 77),
        "'llama.context_length' is of type 77, known are 0 to 12",
    ),
    "too long a text": (after(b"general.architecture", 4, "<Q", 2**40), "has to go on to"),
    "not UTF-8": (lambda data: data.replace(b"llama.context_length", b"\xff" * 20), "not UTF-8"),
    "no architecture": (lambda data: data.replace(b"general.architecture", b"general.architectura"), "is missing"),
    "architecture is a number": (
        lambda data: data.replace(struct.pack("<IQ", 8, 5) + b"llama", struct.pack("<IQ", 10, 5), 1),
        "general.architecture is 5, not a text",
    ),
    "dimensions": (after(b"output_norm.weight", 0, "<I", 2**31), "has 2147483648 dimensions, must be 1 to 4"),
    "shape": (after(b"output_norm.weight", 4, "<Q", 2**60), "has to go on to"),
    "tensor type": (after(b"output_norm.weight", 12, "<I", 999), "type 999, which the package gguf does not know"),
    "row": (after(b"blk.0.attn_q.weight", 4, "<Q", 33), "rows of 33 weights, must be a multiple of 32"),
    "offset": (after(b"output_norm.weight", 16, "<Q", 2**62), "has to go on to"),
    "layers": (after(b"llama.block_count", 4, "<I", 2**31), "'llama.block_count' is 2147483648, must be 0 to 20"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_told_in_one_line(name: str, file: Path, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(change(file.read_bytes()))
    with pytest.raises(GgufError) as caught:
        read_header(broken, SIZES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_is_whole_tells_what_is_in_it(file: Path) -> None:
    header = read_header(file, SIZES)
    assert (header.architecture, header.num_tensors) == ("llama", 2 + 9 * LAYERS)
    assert header.values["llama.context_length"] == CONTEXT
    assert header.num_elements > len(TOKENS) * 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "nonsense"}, "nonsense is not supported"),
        ({"architecture": "bert"}, "transformers cannot read it|is not supported"),
        ({"embedding_length": 2**24}, r"should hold [\d,]+ weights, and holds"),
        ({"feed_forward_length": 64}, "have in another shape"),
        ({"head_count": 0}, "transformers cannot read it"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_told_in_one_line(changes: Any, words: str, fresh: Path) -> None:
    file = write_gguf(fresh / "odd.gguf", **changes)
    with pytest.raises(GgufError, match=words) as caught:
        gguf_child.write_folder(file, fresh / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["serve", "check-model", "build-trigram", "train-ctc"])
def test_every_command_that_takes_a_model_names_the_file(
    command: str, fresh: Path, capfd: pytest.CaptureFixture[str], file: Path
) -> None:
    broken = fresh / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:2000])
    words = {
        "serve": [str(broken), "--port", "0"],
        "check-model": [str(broken)],
        "build-trigram": ["--model", str(broken), "--data", "x.txt", "--out", "x.tri"],
        "train-ctc": ["--model", str(broken), "--data", "x.txt", "--out", "x"],
    }
    assert main([command, *words[command]]) == 2
    assert f"foretoken: {broken}: it ends at byte 2,000" in capfd.readouterr().err


def test_check_model_reads_the_file_as_a_server_would(
    folder: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-model", str(file)]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "can be served" in out


# ---- what can go wrong around it


def test_missing_packages_are_named_with_what_installs_them(
    file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gguf_child, "find_spec", lambda name: None if name == "accelerate" else object())
        with pytest.raises(GgufError, match=r"pip install 'foretoken\[gguf\]'"):
            gguf_child.write_folder(file, fresh / "out")
    monkeypatch.setattr(gguf_child, "version", lambda _: "5.23.1")
    with pytest.raises(GgufError, match=r"needs gguf, accelerate and transformers 5\.24"):
        gguf_child.write_folder(file, fresh / "out")


def test_a_disk_without_room_is_told_before_it_is_filled(
    file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(fresh)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(GgufError, match=r"safetensors, and .* has 0 MB free; XDG_CACHE_HOME"):
        convert(file, fresh / "digest/tiny", file_key(file))
    assert [path.name for path in (fresh / "digest").iterdir()] == [".lock"]


def test_a_disk_that_is_full_all_the_same_leaves_nothing(
    file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: Path, part: Path) -> None:
        part.mkdir()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(gguf_child, "write_folder", write)
    with pytest.raises(GgufError, match=r"cannot keep its weights in .*: No space left"):
        convert(file, fresh / "digest/tiny", file_key(file))
    assert [path.name for path in (fresh / "digest").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["model.gguf", "model"])
def test_a_file_that_cannot_be_read_is_not_taken_for_a_cache_that_cannot_be_written(name: str, fresh: Path) -> None:
    link = fresh / name
    link.symlink_to("/proc/self/mem")  # its first page is never mapped
    with pytest.raises(StartupError, match=rf"{name}: cannot read it: Input/output error$"):
        resolve(str(link))


@pytest.mark.parametrize("failing", ["read_header", "file_key"])
def test_a_converter_that_cannot_read_the_file_says_so(
    failing: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fresh / "a.gguf"
    file.touch()
    key = file_key(file)
    if failing == "file_key":
        monkeypatch.setattr(gguf_child, "write_folder", lambda _, part: part.mkdir())

    def fail(*_: object) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(gguf_child, failing, fail)
    with pytest.raises(GgufError, match=r"^cannot read it: Input/output error$"):
        convert(file, fresh / "digest/a", key)


def test_what_a_conversion_needs_for_a_while_lies_in_the_cache(
    file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(fresh / "absent"))
    convert(file, fresh / "digest/a", file_key(file))
    assert sorted(path.name for path in (fresh / "digest").iterdir()) == [".lock", "a"]


def test_a_cache_that_cannot_be_written_is_told(file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    with pytest.raises(StartupError, match=r"tiny\.Q4_1\.gguf: cannot keep .*XDG_CACHE_HOME names another place"):
        resolve(str(file))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed, as happens where memory runs out"),
        ("raise SystemExit('no torch here')", "ended with 1: no torch here"),
    ],
)
def test_a_converter_that_dies_is_told(
    code: str, words: str, file: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "CHILD_COMMAND", (sys.executable, "-c", code))
    with pytest.raises(StartupError, match=rf"tiny\.Q4_1\.gguf: the process that converts it {words}"):
        resolve(str(file), lambda _: None)


def test_a_damaged_conversion_is_made_again(file: Path, fresh: Path) -> None:
    folder = Path(resolve(str(file)))
    before = {found.name: found.read_bytes() for found in folder.iterdir()}
    (folder / "config.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert Path(resolve(str(file))) == folder
    assert {found.name: found.read_bytes() for found in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-is-called-so/model.gguf"])
def test_a_name_that_cannot_be_looked_for_is_told_in_one_line(name: str) -> None:
    with pytest.raises(StartupError, match="model") as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_damaged_note_of_a_digest_is_not_believed(folder: Path, file: Path) -> None:
    assert resolve(str(file)) == str(folder)
    for damage in (b"\0" * 64, "ü".encode() * 32, b"short"):
        for note in (cache_folder() / "gguf").glob("digest-*"):
            note.write_bytes(damage)
        assert resolve(str(file)) == str(folder)
