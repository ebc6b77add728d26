"""The process that reads one tokenizer with transformers: `python -m server.tokenizer_child FOLDER`, answer on stdout.

Never with code of the model's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from server.tokenizer_reading import Reading, Unreadable

_FULL_FILE = "tokenizer.json"
_OTHER_VOCABULARIES = ("tekken.json", "tiktoken.model")
"""What transformers takes in place of the file that a class asks for."""


def main() -> int:
    """Print the reading of the folder that the command line names."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever the libraries print is not the answer
    # No tokenizer needs torch; importing it would take longer than all the rest.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import transformers

    transformers.logging.set_verbosity_error()
    answer = describe(Path(sys.argv[1]))
    with os.fdopen(answers, "wb") as file:
        file.write(msgspec.json.encode(answer))
    return 0


def describe(folder: Path) -> Reading | Unreadable:
    """The tokenizer of `folder` as transformers loads it.

    Where its class cannot be had (a package is missing) but a tokenizer.json is there, as the generic class reads it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return _reading(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False), folder)
    except Exception as error:  # whatever the readers of a folder's files raise
        reason = _one_line(error)
        if "trust_remote_code" in str(error):
            return Unreadable(
                "it needs code of its own (auto_map in tokenizer_config.json), which is never run; to have "
                "tokenizer.json read as it stands, take auto_map out and make tokenizer_class PreTrainedTokenizerFast"
            )
    if not (folder / _FULL_FILE).is_file():
        return Unreadable(f"{folder} has no {_FULL_FILE}, and transformers makes none of its other files: {reason}")
    try:
        found = _reading(PreTrainedTokenizerFast.from_pretrained(str(folder), trust_remote_code=False), folder)
    except Exception as error:
        return Unreadable(f"{_FULL_FILE} or a file beside it is broken: {_one_line(error)}")
    note = f"{_FULL_FILE} is read as it stands, since transformers cannot make the tokenizer's own class: {reason}"
    return msgspec.structs.replace(found, notes=(note, *found.notes), is_lasting=False)


def _reading(tokenizer: Any, folder: Path) -> Reading:
    """Raises: ValueError if it is not of the tokenizers library, made of nothing, or not to be told whole."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library")
    _check_files(tokenizer, folder)
    written = backend.to_str()
    if _tokens(Tokenizer.from_str(written)) != _tokens(backend):
        # The library numbers added tokens by the size of the vocabulary when it reads them, whatever the file says.
        raise ValueError("the ids of its added tokens do not follow those of its vocabulary, which has gaps")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Reading(
        tokenizer_json=written,
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        chat_template=template if isinstance(template, str) else None,
        notes=_notes(tokenizer),
    )


def _tokens(tokenizer: Tokenizer) -> tuple[dict[str, int], dict[int, str]]:
    """Every token's id, and how the added ones are to be found in a text."""
    added = {token_id: repr(token) for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    return tokenizer.get_vocab(with_added_tokens=True), added


def _check_files(tokenizer: Any, folder: Path) -> None:
    """Some classes make up a vocabulary of three tokens where their files are missing. Raises: ValueError."""
    if (folder / _FULL_FILE).is_file() or any((folder / name).is_file() for name in _OTHER_VOCABULARIES):
        return
    needed = {str(name) for kind, name in type(tokenizer).vocab_files_names.items() if kind != "tokenizer_file"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing or not needed:
        raise ValueError(f"{type(tokenizer).__name__} needs {' and '.join(missing) or _FULL_FILE}")


def _notes(tokenizer: Any) -> tuple[str, ...]:
    """Options that change what transformers reads or writes beside the tokenizer itself."""
    notes = []
    if getattr(tokenizer, "split_special_tokens", False):
        notes.append("split_special_tokens of tokenizer_config.json is not honoured: special tokens stay whole")
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    if getattr(tokenizer, "clean_up_tokenization_spaces", False) and not is_bpe:
        notes.append("clean_up_tokenization_spaces of tokenizer_config.json is not honoured: spaces stay as decoded")
    return tuple(notes)


def _one_line(error: BaseException) -> str:
    """The first line that says something, as the libraries begin some messages with an empty one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
