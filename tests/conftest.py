"""Fixtures that every test may ask for."""

from __future__ import annotations

import os

# Models of tests are tiny, and a second thread of OpenMP, which waits busily, costs more than it does: beside another
# program a run took thirty times as long. It is read when torch is imported, and by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.errors import StartupError
from server.tokenizer_reading import Reading, Unreadable
from tests import kernel_shapes

# Triton reads this when it is imported, which transformers does: without a GPU our kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-shapes`: see tests.kernel_shapes."""
    parser.addoption("--all-shapes", action="store_true", help="try the kernels on all random shapes, and keep that")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out shapes that were tried with these very kernels."""
    if config.getoption("--all-shapes") or torch.cuda.is_available() or not kernel_shapes.are_tried():
        return
    seeds = {item: item.callspec.params.get("seed") for item in items if hasattr(item, "callspec")}
    left_out = [item for item in items if kernel_shapes.is_left_out(item.path, seeds.get(item))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep that all shapes passed."""
    if hasattr(session.config, "workerinput"):
        return  # the process that gathers the results of the others knows whether all passed
    is_whole = session.config.args_source is pytest.Config.ArgsSource.TESTPATHS and not session.config.option.keyword
    if session.config.getoption("--all-shapes") and exitstatus == 0 and is_whole:
        kernel_shapes.keep()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, prompts and texts, which is not part of the project."""
    folder = Path(os.environ.get("FORETOKEN_SHARED") or ROOT.parent / "shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"no shared models and texts in {folder}: name the folder in FORETOKEN_SHARED")
    return folder


@pytest.fixture(autouse=True, scope="session")
def tokenizers_read_here() -> Iterator[None]:
    """Tokenizers are read in this process, which has transformers anyway, and not by a child of seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.model_files.read_tokenizer", _read_here)
        yield


def _read_here(folder: Path) -> Reading:
    from server.tokenizer_child import describe

    answer = describe(folder)
    if isinstance(answer, Unreadable):
        raise StartupError(f"the tokenizer of {folder} cannot be read: {answer.reason}")
    return answer
