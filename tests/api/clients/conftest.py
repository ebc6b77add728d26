"""Servers that the tests of a client library share, and async tests in one loop.

They end with the module: other tests count the processes that are left.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator

import pytest

from tests.api.clients.polite import save_polite
from tests.api.clients.scripted import KEY, Scripted, scripted_server
from tests.api.process import serving
from tests.tool_templates import HERMES

TEMPLATE = HERMES.replace(
    "{% elif m.role == 'user' %}",
    "{% elif m.role == 'system' and not loop.first %}<|system|>{{ m.content }}<|end|>{% elif m.role == 'user' %}",
)
"""Takes a system message anywhere, as Qwen's does."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The loop of all async tests."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def polite_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL, with /v1, of a real server with the model of `polite`, which takes tools."""
    folder = save_polite(tmp_path_factory.mktemp("polite"), TEMPLATE)
    with serving("--model", str(folder), "--served-model-name", "m", "also-m", "--api-key", KEY) as url:
        yield url


@pytest.fixture(scope="module")
def _scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with scripted_server(tmp_path_factory.mktemp("scripted"), TEMPLATE) as server:
        yield server


@pytest.fixture
def scripted(_scripted: Scripted) -> Scripted:
    _scripted.clear()
    return _scripted


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Async tests run in one loop for all: clients keep connections, which belong to the loop that made them."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    runner: asyncio.Runner = pyfuncitem._request.getfixturevalue("runner")
    runner.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


def pytest_configure(config: pytest.Config) -> None:
    """Marks of plugins that langchain-tests would use for the one case that times a stream."""
    for name in ("benchmark", "vcr"):
        config.addinivalue_line("markers", f"{name}: of langchain-tests")
