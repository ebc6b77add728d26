"""The log of a training run, one JSON object a line, and the picture drawn from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drafters.head.files import FileError, write_whole


class Journal:
    """Appends lines to a file. Owns the file's end; lines that a kill cut short, or that are redone, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        """Go on behind `step`. Raises: FileError."""
        self._path = path
        kept = [line for line in read_journal(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, line: dict[str, Any]) -> None:
        """One more line. Raises: FileError."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise FileError(f"cannot write {self._path}: {error.strerror or error}") from error


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none when there is no file. Raises: FileError."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(value)
    return lines


def draw(journal: Path, picture: Path) -> None:
    """Draw surprise and acceptance length over the steps as a PNG. Raises: FileError."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_journal(journal)
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held = [
        (line["step"], line["held_out_loss"], line["acceptance_length"]) for line in lines if "held_out_loss" in line
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*_columns(training, 2), color="0.7", label="training")
    axes.plot(*_columns(held, 3)[:2], color="tab:blue", marker=".", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("surprise per token (nats)")
    right = axes.twinx()
    steps, _, accepted = _columns(held, 3)
    right.plot(steps, accepted, color="tab:orange", marker=".", label="acceptance length")
    right.set_ylabel("acceptance length (tokens a step)")
    figure.legend(loc="outside upper center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(picture, buffer.getvalue())


def _columns(rows: list[Any], count: int) -> list[list[float]]:
    return [[row[index] for row in rows] for index in range(count)]
