"""Panels of a Grafana dashboard as values, and the JSON of a whole board made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 39
"""That of Grafana 11; later ones read it and bring it up to date."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
BOARD_WIDTH = 24
_NARROW = 6
_HIDE = {"id": "organize", "options": {"excludeByName": dict.fromkeys(("Time", "Value", "__name__", "job"), True)}}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression and how its series are called."""

    expr: str
    legend: str = "__auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel; `text` tells how to read it and what to do. Places on a board are counted in 24ths of its width."""

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    defaults: Json = field(default_factory=dict)
    """Beside the unit, what holds for each value: minimum, decimals, steps of colour."""
    options: Json = field(default_factory=dict)
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading, left to right and then on the next line."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard: its name, what it is for, its rows."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]


def steps(*colours: tuple[float | None, str]) -> Json:
    """Colours from a value on; the first holds from minus infinity."""
    return {"thresholds": {"mode": "absolute", "steps": [{"value": at, "color": name} for at, name in colours]}}


def stat(title: str, text: str, expr: str, unit: str, defaults: Json | None = None) -> Panel:
    """A headline number, one eighth of the board wide, its history behind it."""
    return Panel(
        title=title,
        text=text,
        queries=(Query(expr),),
        unit=unit,
        kind="stat",
        width=3,
        height=4,
        defaults={"noValue": "idle", **(defaults or steps((None, "blue")))},
    )


def quantiles(name: str, labels: str = '{instance=~"$instance"}') -> tuple[Query, ...]:
    """The middle, the slowest twentieth and the slowest hundredth of a histogram."""
    buckets = f"sum by (le) (rate({name}_bucket{labels}[$__rate_interval]))"
    return tuple(Query(f"histogram_quantile({q}, {buckets})", f"p{100 * q:g}") for q in (0.5, 0.95, 0.99))


def heatmap(title: str, text: str, name: str, unit: str, width: int = 8) -> Panel:
    """How a histogram's values are spread over time."""
    expr = f'sum by (le) (increase({name}_bucket{{instance=~"$instance"}}[$__rate_interval]))'
    return Panel(title=title, text=text, queries=(Query(expr, "{{le}}"),), unit=unit, kind="heatmap", width=width)


def to_json(board: Board) -> Json:
    """The dashboard as Grafana stores it; ids and places follow from the order of the panels."""
    panels: list[Json] = []
    top = 0
    for row in board.rows:
        place = {"x": 0, "y": top, "w": BOARD_WIDTH, "h": 1}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        placed, top = _place(row.panels, top + 1)
        for panel, place in placed:
            panels.append(_panel(panel, len(panels) + 1, place))
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.text,
        "tags": ["foretoken"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "refresh": "10s",
        "fiscalYearStartMonth": 0,
        "annotations": {"list": [_restarts()]},
        "links": [_link()],
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _place(panels: Sequence[Panel], top: int) -> tuple[list[tuple[Panel, Json]], int]:
    """Where each panel goes, line after line, and the first free height below them."""
    placed: list[tuple[Panel, Json]] = []
    left = line = 0
    for panel in panels:
        if left + panel.width > BOARD_WIDTH:
            top, left, line = top + line, 0, 0
        placed.append((panel, {"x": left, "y": top, "w": panel.width, "h": panel.height}))
        left, line = left + panel.width, max(line, panel.height)
    return placed, top + line


def _panel(panel: Panel, number: int, place: Json) -> Json:
    is_heatmap, is_now = panel.kind == "heatmap", panel.kind in ("bargauge", "table")
    shape = {"format": "heatmap" if is_heatmap else "table" if panel.kind == "table" else "time_series"}
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": DATASOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "editorMode": "code",
            "instant": is_now,
            "range": not is_now,
            **shape,
        }
        for place, query in enumerate(panel.queries)
    ]
    defaults = {"unit": panel.unit, **steps((None, "green")), **panel.defaults}
    if panel.kind == "timeseries":
        defaults["color"] = {"mode": "palette-classic"}
        defaults["custom"] = {**_lines(panel.is_stacked), **panel.defaults.get("custom", {})}
    elif not is_heatmap:
        defaults = {"color": {"mode": "thresholds"}, **defaults}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {**_options(panel), **panel.options},
        "transformations": [_HIDE] if panel.kind == "table" else [],
    }


def _lines(is_stacked: bool) -> Json:
    return {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1 if is_stacked else 2,
        "fillOpacity": 40 if is_stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off"},
    }


def _options(panel: Panel) -> Json:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "stat":
        looks = {"colorMode": "background_solid", "graphMode": "area", "justifyMode": "auto", "textMode": "value"}
        return {**looks, "orientation": "auto", "reduceOptions": last, "wideLayout": True}
    if panel.kind == "bargauge":
        bars = {"displayMode": "gradient", "orientation": "horizontal", "showUnfilled": True, "valueMode": "color"}
        return {
            **bars,
            "minVizHeight": 12,
            "minVizWidth": 8,
            "maxVizHeight": 40,
            "namePlacement": "auto",
            "sizing": "auto",
            "reduceOptions": last,
        }
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "color": {
                "mode": "scheme",
                "scheme": "Blues",
                "fill": "blue",
                "exponent": 0.5,
                "steps": 64,
                "reverse": False,
                "scale": "exponential",
            },
            "yAxis": {"axisPlacement": "left", "unit": panel.unit, "reverse": False},
            "cellGap": 1,
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
            "showValue": "never",
            "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
        }
    if panel.kind == "table":
        return {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"], "fields": ""}}
    legend: Json = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["mean", "lastNotNull"]}
    if panel.width < _NARROW:
        legend |= {"displayMode": "list", "calcs": []}
    return {
        "legend": legend,
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _variables() -> list[Json]:
    instances = "label_values(foretoken_worker_up, instance)"
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {"selected": True, "text": "Prometheus", "value": "foretoken-prometheus"},
            "hide": 0,
            "includeAll": False,
            "multi": False,
            "options": [],
            "refresh": 1,
            "regex": "",
        },
        {
            "name": "instance",
            "label": "Server",
            "type": "query",
            "datasource": DATASOURCE,
            "query": {"query": instances, "refId": "instances"},
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "allValue": ".*",
            "includeAll": True,
            "multi": True,
            "hide": 0,
            "options": [],
            "refresh": 2,
            "regex": "",
            "sort": 1,
        },
    ]


def _restarts() -> Json:
    return {
        "name": "Worker restarts",
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "expr": 'changes(foretoken_worker_restarts_total{instance=~"$instance"}[$__rate_interval]) > 0',
        "titleFormat": "Worker of {{instance}} replaced",
        "step": "10s",
    }


def _link() -> Json:
    return {
        "title": "Foretoken",
        "type": "dashboards",
        "tags": ["foretoken"],
        "asDropdown": False,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }
