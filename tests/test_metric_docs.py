"""The tables of metrics: every name that is exported stands in them with its type and labels, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.messages import Ready
from server.metrics import Metrics, ServerFacts

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| `(foretoken_\w+)` \| (\w+) \| ([^|]*) \| [^|]+ \|$", re.MULTILINE)
ALIAS = re.compile(r"^\| `(vllm:\w+)` \| (\w+) \| (.+) \|$", re.MULTILINE)


def described() -> Metrics:
    metrics = Metrics()
    metrics.describe(
        ServerFacts(version="1", model="m", drafter="hybrid", max_rows=4, page_size=16, has_vllm_aliases=True)
    )
    metrics.worker_ready(Ready(100, 200, ("none", "hybrid"), "cpu", "float32", 63, {"hybrid": {"texts": 5}}))
    return metrics


def exported(metrics: Metrics) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Type and labels of our families by the name that is exported."""
    found = {}
    for name, family in metrics.families.by_name.items():
        (one,) = family.collect()
        suffix = "_total" if one.type == "counter" else ""
        found[f"foretoken_{name}{suffix}"] = (one.type, metrics.families.labels[name])
    return found


def names_in(text: str) -> set[str]:
    """Every full name of ours; `foretoken_spec_...` is none."""
    return {name for name in re.findall(r"\bforetoken_\w+", text) if not name.endswith("_")}


@pytest.mark.parametrize("document", ["server/README.md", "docs/metrics.md"])
def test_every_metric_is_told_once_with_its_type_and_labels(document: str) -> None:
    rows = ROW.findall((ROOT / document).read_text(encoding="utf-8"))
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(told) == len(rows), "a name stands there twice"
    assert told == exported(described())


@pytest.mark.parametrize("document", ["server/README.md", "docs/metrics.md"])
def test_no_metric_is_told_that_is_not_exported(document: str) -> None:
    real = exported(described())
    series = {
        f"{name}{part}" for name, (kind, _) in real.items() if kind == "histogram" for part in ("_bucket", "_sum")
    }
    assert names_in((ROOT / document).read_text(encoding="utf-8")) - set(real) - series == set()


def test_every_alias_is_told_with_its_type_and_source() -> None:
    rows = ALIAS.findall((ROOT / "docs/metrics.md").read_text(encoding="utf-8"))
    told = {name: kind for name, kind, _ in rows}
    assert len(told) == len(rows)
    metrics = described()
    real = {family.name: family for family in metrics.registry.collect() if family.name.startswith("vllm:")}
    assert told == {f"{name}{'_total' if one.type == 'counter' else ''}": one.type for name, one in real.items()}
    for name, _, source in rows:
        family = real.get(name) or real[name.removesuffix("_total")]
        if family.documentation.startswith("foretoken_"):
            assert f"`{family.documentation.split(':')[0]}" in source, name


def test_every_expression_is_well_formed() -> None:
    """Names, brackets and windows; Prometheus itself parses the ones of the boards."""
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    section = page.split("## What to look at")[1].split("\n## ")[0]
    expressions = re.findall(r"^\| [^|`]+ \| `([^`]+)` \|$", section, re.MULTILINE)
    assert len(expressions) > 10
    for expression in expressions:
        assert names_in(expression), expression
        assert expression.count("(") == expression.count(")"), expression
        for name in names_in(expression):
            is_counted = name.endswith(("_total", "_sum", "_bucket")) and name != "foretoken_kv_pages_total"
            assert is_counted == bool(re.search(rf"{name}(\{{[^}}]*\}})?\[5m\]", expression)), expression
