"""Compiled code is kept where nobody else can have put files."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from verifier.private_folder import keep_compiled_graphs, private_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)


def test_torch_keeps_its_code_in_the_private_folder_though_it_has_named_its_default() -> None:
    default = cache_dir()  # writes it into the environment, as importing parts of torch does
    keep_compiled_graphs()
    assert cache_dir() == str(private_folder() / "inductor") != default


def test_a_place_that_the_user_names_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    keep_compiled_graphs()
    assert cache_dir() == str(tmp_path / "mine")


def test_a_folder_that_others_may_write_to_is_refused() -> None:
    private_folder().chmod(0o777)
    with pytest.raises(OSError, match="alone"):
        private_folder()
