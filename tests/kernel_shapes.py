"""Which random shapes the kernels are tried on. In Triton's interpreter each takes seconds, and they change seldom.

`make test` takes three of each kernel while kernels and tests are those of the last `make test-all`, which takes all
and keeps their digest in tests/kernels.sha256.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_KEPT = TESTS / "kernels.sha256"
_FEW = 3
_FILES = ("test_triton_*.py", "test_attention.py")


def digest() -> str:
    """Of the kernels, what launches them, and their tests."""
    found = hashlib.sha256()
    files = [*(TESTS.parent / "verifier" / "cuda").rglob("*.py")]
    for pattern in _FILES:
        files += (TESTS / "unit").glob(pattern)
    for file in sorted(files):
        found.update(f"{file.relative_to(TESTS.parent)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()


def are_tried() -> bool:
    """Whether all shapes passed with these very files."""
    return _KEPT.exists() and _KEPT.read_text(encoding="ascii").strip() == digest()


def keep() -> None:
    """All shapes have passed."""
    _KEPT.write_text(digest() + "\n", encoding="ascii")


def is_left_out(file: Path, seed: object) -> bool:
    """Whether a test of `file` with this seed is one shape too many."""
    return any(file.match(pattern) for pattern in _FILES) and isinstance(seed, int) and seed >= _FEW
