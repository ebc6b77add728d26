"""Writes the dashboards that Grafana is provisioned with."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.make.panels import to_json
from deploy.grafana.make.serving import SERVING
from deploy.grafana.make.speculation import SPECULATION

FOLDER = Path(__file__).resolve().parent.parent / "dashboards"


def boards() -> dict[Path, str]:
    """What each file is to hold."""
    named = {"serving": SERVING, "speculation": SPECULATION}
    return {
        FOLDER / f"{name}.json": json.dumps(to_json(board), indent=1, ensure_ascii=False) + "\n"
        for name, board in named.items()
    }


if __name__ == "__main__":
    for path, text in boards().items():
        path.write_text(text, encoding="utf-8")
