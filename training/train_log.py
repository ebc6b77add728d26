"""The log of a training run, one JSON object a line, and the plot of it."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from drafters.head.files import FileError, write_whole


class TrainLog:
    """Appends lines to a file. Owns the file's end; lines that a kill cut short, or that are redone, are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        """Go on behind `step`. Raises: FileError."""
        self._path = path
        kept = [line for line in read_log(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, line: dict[str, Any]) -> None:
        """One more line. Raises: FileError."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise FileError(f"cannot write {self._path}: {error.strerror or error}") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines; none when there is no file. Raises: FileError."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
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


def plot(log: Path, picture: Path) -> None:
    """Plot loss and acceptance length over the steps as a PNG; without matplotlib, say so on stderr.

    Raises: FileError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {picture.name}: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    right = axes.twinx()
    axes.set_xlabel("step")
    axes.set_ylabel("negative log-likelihood per token (nats)")
    right.set_ylabel("acceptance length (tokens per step)")
    lines = read_log(log)
    for axis, key, label, color in (
        (axes, "loss", "training", "0.7"),
        (axes, "held_out_loss", "held out", "tab:blue"),
        (right, "acceptance_length", "acceptance length", "tab:orange"),
    ):
        found = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot([step for step, _ in found], [value for _, value in found], label=label, color=color)
    figure.legend(loc="outside upper center", ncols=3)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(picture, buffer.getvalue())
