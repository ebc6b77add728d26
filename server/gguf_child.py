"""The process that converts one GGUF file: `python -m server.gguf_child FILE FOLDER KEY`, answer on stdout.

Ends with the one that started it. What it had written by then goes at the next conversion of the same file.
"""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from server.gguf import Converted, Unconvertible, file_key, is_whole, note_sizes
from server.gguf_header import GgufError, GgufHeader, read_header
from verifier.parent import die_with_parent

if TYPE_CHECKING:
    import torch

_PART = ".part-"
_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""End of text, of turn and of message: each ends an answer."""


def main() -> int:
    """Convert, and print the answer."""
    die_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print is not the answer
    file, folder, key = sys.argv[1:]
    answer: Converted | Unconvertible = Converted()
    if find_spec("gguf") is not None:
        _keep_readings()
    try:
        convert(Path(file), Path(folder), key)
    except GgufError as error:
        answer = Unconvertible(str(error))
    with os.fdopen(answers, "wb") as out:
        out.write(msgspec.json.encode(answer))
    return 0


def _keep_readings() -> None:
    """Read a header once where transformers reads it twice, and asks for the table of names once per module.

    That is a third of the time. It suits a process that converts one file and ends.
    """
    import gguf

    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def convert(file: Path, folder: Path, key: str) -> None:
    """Make `folder`, whole or not at all; several processes may want it at once, and one of them makes it.

    Args: `key` is server.gguf.file_key of the content that the folder is named by.
    Raises: GgufError in one line.
    """
    try:
        folder.parent.mkdir(exist_ok=True)
        with _alone(folder.parent):
            if is_whole(folder):
                return
            shutil.rmtree(folder, ignore_errors=True)
            for left in folder.parent.glob(f"{_PART}*"):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_PART) as scratch:
                part = Path(scratch) / folder.name
                write_folder(file, part)
                with _reading():
                    if file_key(file) != key:
                        raise GgufError("it was written to while it was read")
                note_sizes(part)
                _sync(part)
                part.rename(folder)
    except OSError as error:
        raise GgufError(f"cannot keep its weights in {folder}: {error.strerror or error}") from error


@contextmanager
def _reading() -> Iterator[None]:
    """Tell a failure to read the file from one to write its weights. Raises: GgufError."""
    try:
        yield
    except OSError as error:
        raise GgufError(f"cannot read it: {error.strerror or error}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; it goes with the process."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Let the files reach the disk before the folder gets its name: a power cut leaves all of them or none."""
    for path in (*folder.iterdir(), folder):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def write_folder(file: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer of `file` in Hugging Face format. Raises: GgufError, OSError."""
    if find_spec("gguf") is None or find_spec("accelerate") is None or _transformers() < (5, 24):
        raise GgufError("reading it needs gguf, accelerate and transformers 5.24: pip install 'foretoken[gguf]'")
    from gguf.constants import GGML_QUANT_SIZES

    with _reading():
        header = read_header(file, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=folder.parent) as alone:
        # A folder with this file alone: nothing that lies beside it is read.
        link = Path(alone) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            network = _load(link, header)
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
                alone, gguf_file=link.name, trust_remote_code=False
            )
        except GgufError:
            raise
        except MemoryError:
            raise GgufError("its weights do not fit into memory as float32, in which they are converted") from None
        except Exception as error:  # whatever the readers of a file raise
            raise GgufError(f"transformers cannot read it: {_one_line(error)}") from error
    for parameter in network.parameters():
        parameter.data = narrowest(parameter.data)
    _check_room(network, folder.parent)
    _name_ends(network, header)
    try:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _drop_invented_tokens(folder / "tokenizer.json", network.get_input_embeddings().num_embeddings)
    except OSError:
        raise
    except Exception as error:  # safetensors has an exception of its own for a full disk
        raise GgufError(f"cannot keep its weights in {folder}: {_one_line(error)}") from error


def _load(link: Path, header: GgufHeader) -> Any:
    """The network, in float32. Raises: GgufError, and what transformers raises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from verifier.model import ModelError, build_on_meta, misfit

    config = AutoConfig.from_pretrained(str(link.parent), gguf_file=link.name, trust_remote_code=False)
    try:
        # Without this a header could ask for any amount of memory: weights that the file lacks would be made up.
        network = build_on_meta(copy.deepcopy(config))
        num_elements = sum(parameter.numel() for parameter in network.parameters())
        if num_elements > header.num_elements:
            raise GgufError(f"it is broken: it should hold {num_elements:,} weights, and holds {header.num_elements:,}")
        network, report = AutoModelForCausalLM.from_pretrained(
            str(link.parent),
            gguf_file=link.name,
            config=config,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ModelError as error:
        raise GgufError(str(error)) from error
    if problem := misfit(report):
        raise GgufError(f"its weights do not fit its configuration: {problem}")
    return network


def narrowest(weight: torch.Tensor) -> torch.Tensor:
    """The same values in 16 bits if each of them fits, else as they are: nothing is lost, and no file is wasted."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(dtype)
        if torch.equal(narrow.to(weight.dtype), weight):
            return narrow
    return weight


def _check_room(network: Any, folder: Path) -> None:
    """Raises: GgufError if the weights would fill the disk."""
    num_bytes = sum(parameter.nbytes for parameter in network.parameters())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise GgufError(
            f"its weights take {num_bytes / 1e6:,.0f} MB as safetensors, and {folder.parent} has {free / 1e6:,.0f} MB "
            "free; XDG_CACHE_HOME names another place for caches"
        )


def _name_ends(network: Any, header: GgufHeader) -> None:
    """Every end token of the file, for whoever reads the folder."""
    named = [header.values.get(f"tokenizer.ggml.{name}") for name in _END_FIELDS]
    ends = list(dict.fromkeys(number for number in named if type(number) is int))
    network.generation_config.eos_token_id = ends or None
    network.generation_config._from_model_config = False


def _drop_invented_tokens(file: Path, num_embeddings: int) -> None:
    """Some classes of transformers add a token that the vocabulary lacks; the model has no weights for it."""
    written = json.loads(file.read_text(encoding="utf-8"))
    written["added_tokens"] = [token for token in written["added_tokens"] if token["id"] < num_embeddings]
    file.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def _transformers() -> tuple[int, ...]:
    """The version; before 5.24 there was no way to say whether weights are unpacked."""
    return tuple(int(number) for number in version("transformers").split(".")[:2])


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
