"""How Python functions are compiled: interpreter lock released, machine code kept on disk until a source changes.

Numba looks only at the file of the function itself. But what it calls, and the constants it reads, are compiled into it
wherever they stand: after an upgrade it would find, and run, what the old files said. So the folder of what is kept is
named by all sources of both packages.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba

from verifier.private_folder import cache_folder, private_folder

_ROOT = Path(__file__).parents[1]
_PREFIX, _DIGITS = "foretoken-numba-", 16
_KEPT_S = 7 * 86400
"""Code of sources that no process has had for so long goes. A switch between two versions of them costs nothing."""


def jit(**options: Any) -> Callable[[Callable[..., object]], Any]:
    """A decorator: numba.njit with `options`, without the interpreter lock, kept on disk where that can be."""

    def compiled(function: Callable[..., object]) -> Any:
        named = numba.config.CACHE_DIR
        folder = code_folder()
        numba.config.CACHE_DIR = str(folder or "")  # read here and now, when a function learns where it is kept
        try:
            return numba.njit(**options, cache=folder is not None, nogil=True)(function)
        finally:
            numba.config.CACHE_DIR = named

    return compiled


def code_folder() -> Path | None:
    """Where compiled code of these sources is kept: in NUMBA_CACHE_DIR; else beside the package, or with the user's
    caches. None where nothing can be written."""
    return _folder(numba.config.CACHE_DIR)


@cache
def _folder(named: str) -> Path | None:
    name = _PREFIX + digest_of(_ROOT)
    for place in _places(named):
        try:
            folder = place() / name
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            if not os.access(folder, os.W_OK):
                continue
        except OSError:
            continue
        _forget(folder)
        return folder
    return None


def machine() -> str:
    """A name for what the code was compiled by and for: on another processor it is of no use."""
    features = llvmlite.binding.get_host_cpu_features().flatten()
    kind = f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()} {features}"
    return hashlib.sha256(kind.encode()).hexdigest()[:_DIGITS]


def _places(named: str) -> Iterator[Callable[[], Path]]:
    if named:
        yield lambda: Path(named)
    yield lambda: Path(__file__).parent / "__pycache__"
    yield cache_folder
    yield private_folder


def digest_of(root: Path) -> str:
    """Of all Python files of the packages `verifier` and `drafters` in `root`."""
    found = hashlib.sha256()
    for package in ("verifier", "drafters"):
        for file in sorted((root / package).rglob("*.py")):
            found.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:_DIGITS]


def _forget(kept: Path) -> None:
    """Remove the folders of this kind beside `kept` that no process has asked for in _KEPT_S.

    The place may be anybody's, /tmp for one: nothing else there is touched.
    """
    for other in kept.parent.glob(_PREFIX + "[0-9a-f]" * _DIGITS):
        try:
            is_old = other.stat().st_mtime < time.time() - _KEPT_S
        except OSError:
            continue
        if is_old and other != kept:
            shutil.rmtree(other, ignore_errors=True)
