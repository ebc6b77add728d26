"""Dashboards, rules and alerts: whole, and about metrics that exist."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.make.__main__ import boards
from server.metrics import Metrics
from tests.watched import (
    BOARDS,
    DEPLOY,
    PROMETHEUS,
    board_expressions,
    metric_names,
    panels,
    read_board,
    rules,
    without_comparisons,
)

OPERATIONS = DEPLOY.parent / "docs/operations.md"
KINDS = {"stat", "timeseries", "heatmap", "bargauge", "table"}
UNITS = {"s", "ms", "bytes", "percentunit", "none", "ops", "reqps", "suffix:x"}


@pytest.fixture(params=BOARDS, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_board(request.param)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every series name that a scrape has, and what the recording rules make."""
    names = {line.split("{")[0].split(" ")[0] for line in Metrics().render().decode().splitlines() if line[:1] != "#"}
    described = {line.split(" ")[2] for line in Metrics().render().decode().splitlines() if line.startswith("# TYPE")}
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", Metrics().render().decode(), flags=re.MULTILINE))
    parts = {
        f"{name}_{part}" for name in described if kinds[name] == "histogram" for part in ("bucket", "sum", "count")
    }
    return names | described | parts | {rule["record"] for rule in rules("recording")}


def test_there_are_the_two_boards() -> None:
    assert [path.stem for path in BOARDS] == ["serving", "speculation"]


@pytest.mark.parametrize("path", boards(), ids=lambda path: path.stem)
def test_the_files_are_what_the_makers_make(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == boards()[path], "run: python -m deploy.grafana.make"


def test_a_board_is_whole(board: dict[str, Any]) -> None:
    assert all(board[name] for name in ("uid", "title", "description"))
    assert board["schemaVersion"] >= 39
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in board["panels"]]
    assert len(set(titles)) == len(titles)


def test_the_first_row_is_headline_numbers(board: dict[str, Any]) -> None:
    first, *rest = board["panels"]
    assert first["type"] == "row"
    headline = rest[: next(place for place, panel in enumerate(rest) if panel["type"] == "row")]
    assert len(headline) >= 6
    assert {panel["type"] for panel in headline} == {"stat"}


def test_no_two_panels_overlap(board: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in board["panels"]]
    for place in places:
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        assert min(place["w"], place["h"]) > 0
    for one, other in combinations(places, 2):
        apart_across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_down = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_across or apart_down, (one, other)


def test_each_panel_says_what_it_shows(board: dict[str, Any]) -> None:
    for panel in panels(board):
        name = panel["title"]
        assert panel["type"] in KINDS, name
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, name
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, name
        assert re.fullmatch(r"(?s).{25,}\.", panel["description"]), name
        assert panel["targets"], name
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), name
        assert all(target["expr"] and target["datasource"] == panel["datasource"] for target in panel["targets"]), name


def test_each_series_of_a_panel_is_of_the_chosen_servers(board: dict[str, Any]) -> None:
    for where, expression in board_expressions(board):
        chosen = re.findall(r'foretoken_\w+\{[^}]*instance=~"\$instance"', expression)
        assert len(chosen) == len(re.findall(r"foretoken_\w+", expression)), where


def test_panels_ask_for_metrics_that_exist(board: dict[str, Any], known: set[str]) -> None:
    for where, expression in board_expressions(board):
        assert metric_names(expression) <= known, where


@pytest.mark.parametrize("name", ["recording", "alerts"])
def test_rules_ask_for_metrics_that_exist(name: str, known: set[str]) -> None:
    for rule in rules(name):
        assert metric_names(rule["expr"]) <= known, rule


def test_the_boards_use_the_provisioned_data_source() -> None:
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    for path in BOARDS:
        chosen = {variable["name"]: variable for variable in read_board(path)["templating"]["list"]}["datasource"]
        assert chosen["current"]["value"] == source["uid"]


def test_each_alert_tells_what_is_wrong() -> None:
    for alert in rules("alerts"):
        assert alert["labels"]["severity"] in ("warning", "critical")
        notes = alert["annotations"]
        assert notes["summary"]
        assert "$value" in notes["description"]
        assert re.fullmatch(r"docs/operations\.md#[a-z-]+", notes["runbook"])
        assert without_comparisons(alert["expr"]) != alert["expr"]


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fired, silent = set(), set()
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for case in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for check in case.get("alert_rule_test", ()):
                (fired if check["exp_alerts"] else silent).add(check["alertname"])
    names = {alert["alert"] for alert in rules("alerts")}
    assert fired == names
    assert silent == names


def test_each_alert_has_its_paragraph_for_the_operator() -> None:
    headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r'<a (?:id|name)="([^"]+)"', OPERATIONS.read_text(encoding="utf-8")))
    wanted = {alert["annotations"]["runbook"].split("#")[1] for alert in rules("alerts")}
    assert wanted <= anchors
