"""What Prometheus and Grafana are told to ask, read from deploy/ for the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
BOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))


def read_board(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return board


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something: all but the headings of rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def board_expressions(board: dict[str, Any]) -> list[tuple[str, str]]:
    """(where, expression) of each target of each panel."""
    return [
        (f"{board['uid']}: {panel['title']} {target['refId']}", target["expr"])
        for panel in panels(board)
        for target in panel["targets"]
    ]


def rules(name: str) -> list[dict[str, Any]]:
    """The rules of a file, `recording` or `alerts`."""
    groups = yaml.safe_load((PROMETHEUS / f"rules/{name}.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def without_comparisons(expression: str) -> str:
    """The vectors that an alert compares, joined as the alert joins them: it has data, be all well or not."""
    return re.sub(r"(?<!\w)(?:==|!=|>=|<=|>|<)\s*-?\d+(?:\.\d+)?", "", expression)


def metric_names(expression: str) -> set[str]:
    """Names of metrics in an expression: ours, and those of recording rules."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}', "", expression)
    return set(re.findall(r"\b(?:job(?:_\w+)?:)?foretoken_\w+(?::\w+)?", bare))
