"""A short run of tests/bench/conformance.py: the demo server does what its /openapi.json says."""

from __future__ import annotations

import pytest

from tests.api.process import DEMO, serving

pytest.importorskip("schemathesis", reason="schemathesis is not installed", exc_type=ImportError)


def test_the_server_does_what_its_document_says() -> None:
    from tests.bench.conformance import Tester

    with serving(*DEMO) as url:
        found = Tester(url.removesuffix("/v1"), seed=1).run(100)
    assert found.num_cases >= 100
    assert set(found.phases) == {"positive", "negative", "coverage"}
    assert not found.faults
    statuses = {status for _, status in found.statuses}
    assert {200, 400, 404} <= statuses
    assert max(statuses) < 500
