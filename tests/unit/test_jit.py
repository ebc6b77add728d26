"""What is compiled is kept, and only as long as every source it came from is the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import verifier

CALLER = """
from drafters.constants import FACTOR
from verifier.jit import jit

@jit()
def scaled(number):
    return number * FACTOR

print(scaled(2), sum(scaled.stats.cache_hits.values()))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for package in ("verifier", "drafters"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    for name in ("jit.py", "private_folder.py"):
        shutil.copy(Path(verifier.__file__).with_name(name), tmp_path / "verifier")
    (tmp_path / "verifier" / "caller.py").write_text(CALLER)
    return tmp_path


def run(packages: Path, factor: int, kept: str = "") -> list[str]:
    (packages / "drafters" / "constants.py").write_text(f"FACTOR = {factor}\n")
    place = {"PYTHONPATH": str(packages), "NUMBA_CACHE_DIR": kept, "XDG_CACHE_HOME": str(packages / "user")}
    environment = {name: value for name, value in (os.environ | place).items() if value}
    command = [sys.executable, "-m", "verifier.caller"]
    done = subprocess.run(command, env=environment, cwd=packages, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_code_is_kept_until_a_constant_of_another_file_changes(packages: Path) -> None:
    assert run(packages, 3) == ["6", "0"]
    assert run(packages, 3) == ["6", "1"]
    assert run(packages, 5) == ["10", "0"]
    assert run(packages, 3) == ["6", "1"], "two versions may take turns"


def test_code_is_kept_where_it_can_be(packages: Path) -> None:
    """A place that is a file, or lies below one, stands for one that cannot be written."""
    (packages / "file").touch()
    assert run(packages, 3, kept=str(packages / "file")) == ["6", "0"]
    assert list((packages / "verifier" / "__pycache__").glob("foretoken-numba-*"))
    shutil.rmtree(packages / "verifier" / "__pycache__")
    (packages / "verifier" / "__pycache__").touch()
    assert run(packages, 3) == ["6", "0"]
    assert list((packages / "user" / "foretoken").glob("foretoken-numba-*"))
    assert run(packages, 3, kept=str(packages / "named")) == ["6", "0"]
    assert list((packages / "named").glob("foretoken-numba-*"))


def test_code_of_old_sources_goes(packages: Path) -> None:
    run(packages, 3)
    (folder,) = (packages / "verifier" / "__pycache__").glob("foretoken-numba-*")
    run(packages, 5)
    assert folder.is_dir()
    others = [folder.with_name(name) for name in ("foretoken-0", "foretoken-models", "foretoken-numba-notes")]
    for other in others:
        other.mkdir()
    long_ago = time.time() - 8 * 86400
    for old in (folder, *others):
        os.utime(old, (long_ago, long_ago))
    run(packages, 5)
    assert not folder.exists()
    assert all(other.is_dir() for other in others), "what is not ours stays"
