"""What transformers makes of a model folder's tokenizer: asked in a process of its own, kept for the next start.

Only transformers knows how a tokenizer class, its options and the tokens beside tokenizer.json change it, and importing
transformers takes seconds and hundreds of MiB that this process does not have.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import msgspec

from server.child_environment import child_environment
from server.errors import StartupError
from verifier.private_folder import private_folder

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*.jinja")
"""All that may say something about a tokenizer, as patterns in a model folder."""

CHILD_COMMAND = (sys.executable, "-P", "-m", "server.tokenizer_child")

_LIMIT_S = 120.0
"""How long the child may take: it needs 2 s, on a busy machine with a cold disk ten times that."""

_MOST_KEPT = 8
"""Readings on disk; one of the largest vocabularies takes 35 MB."""


class Reading(msgspec.Struct, frozen=True, kw_only=True, tag="reading"):
    """A tokenizer as transformers loads it."""

    tokenizer_json: str
    """In the format of tokenizer.json, with all added tokens."""
    special_tokens: dict[str, str]
    """bos_token, eos_token ... as the chat template sees them."""
    chat_template: str | None
    notes: tuple[str, ...] = ()
    """What of the folder is not honoured, one line each."""
    is_lasting: bool = True
    """Whether only another folder can change it; not so if a package was missing."""


class Unreadable(msgspec.Struct, frozen=True, tag="unreadable"):
    """Why there is no tokenizer to be had."""

    reason: str


def read_tokenizer(folder: Path) -> Reading:
    """The tokenizer of `folder`, from an earlier start if nothing has changed. Raises StartupError in one line."""
    path = _place_of(folder)
    found = None if path is None else _kept(path)
    if found is None:
        answer = _ask(folder)
        if isinstance(answer, Unreadable):
            raise StartupError(f"the tokenizer of {folder} cannot be read: {answer.reason}")
        found = answer
        if path is not None and found.is_lasting:
            with contextlib.suppress(OSError):
                _keep(found, path)
    return found


def _place_of(folder: Path) -> Path | None:
    """Where the reading of this content by these libraries is kept; None if nothing can be kept."""
    digest = hashlib.sha256()
    for package in ("transformers", "tokenizers"):
        digest.update(f"{package} {version(package)}\n".encode())
    own = [Path(__file__), Path(__file__).with_name("tokenizer_child.py")]
    files = sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern) if path.is_file()})
    try:
        for path in (*own, *files):
            content = path.read_bytes()
            name = path.name if path in own else path.relative_to(folder)
            digest.update(f"{name} {len(content)}\n".encode())
            digest.update(content)
        return private_folder() / f"tokenizer-{digest.hexdigest()[:32]}.json"
    except OSError:
        return None


def _kept(path: Path) -> Reading | None:
    """An earlier reading; None if there is none or the file is broken."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Reading)
    except (OSError, msgspec.DecodeError):
        return None


def _keep(reading: Reading, path: Path) -> None:
    """Write it, whole or not at all, and forget the oldest beyond what is kept. Raises: OSError."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        written.write_bytes(msgspec.json.encode(reading))
        written.replace(path)
    by_age = sorted(path.parent.glob("tokenizer-*.json"), key=lambda kept: kept.stat().st_mtime)
    for old in by_age[:-_MOST_KEPT]:
        old.unlink(missing_ok=True)


def _ask(folder: Path) -> Reading | Unreadable:
    """Have a child read it: no terminal to ask, no network, no key."""
    environment = child_environment() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [*CHILD_COMMAND, str(folder)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LIMIT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unreadable(f"the process that reads it did not answer: {error}")
    try:
        return msgspec.json.decode(done.stdout, type=Reading | Unreadable)
    except msgspec.DecodeError:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        return Unreadable(f"the process that reads it ended with {done.returncode}: {words[-1] if words else ''}")
