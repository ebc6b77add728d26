"""What tests of the HTTP side leave behind is gone before other tests look."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.house import close_processes


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    close_processes()
