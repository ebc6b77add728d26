"""How many threads compute, on machines of any kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from verifier.cpu import threads


@pytest.mark.parametrize(
    ("num_cpus", "siblings", "quota", "expected"),
    [
        (1, 1, "max 100000", 1),
        (2, 1, "max 100000", 2),
        (3, 1, "max 100000", 3),
        (8, 1, "max 100000", 7),
        (8, 2, "max 100000", 4),
        (2, 2, "max 100000", 1),
        (64, 2, "200000 100000", 2),
        (64, 1, "150000 100000", 2),
        (16, 1, "50000 100000", 1),
        (64, 2, "1600000 100000", 15),
        (16, 1, None, 15),
    ],
)
def test_cores_quota_and_siblings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cpus: int, siblings: int, quota: str | None, expected: int
) -> None:
    for cpu in range(num_cpus):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        first = cpu - cpu % siblings
        (folder / "thread_siblings_list").write_text(f"{first}-{first + siblings - 1}\n")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num_cpus)))
    assert threads.num_compute_threads() == expected
