"""Flags that `foretoken build-trigram` and `foretoken train-ctc` share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from server.config import SettingsError


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same in both commands."""
    add = parser.add_argument
    add("--revision", default="", help="branch, tag or commit of a Hub model")
    add("--separator", default="<|endoftext|>", help="parts the documents of a .txt file, within a line [%(default)s]")
    add("--max-tokens", type=int, default=256, metavar="N", help="longest answer that the model writes [%(default)s]")
    add("--quiet", action="store_true", help="no progress bars")


def check_limits(arguments: argparse.Namespace, limits: Mapping[str, tuple[float, float]]) -> None:
    """`limits`: least and greatest value by flag. Raises: SettingsError that names the first wrong flag."""
    if "\n" in arguments.separator:
        raise SettingsError("--separator: a line end cannot part documents, texts are read line by line")
    for name, (low, high) in limits.items():
        value = getattr(arguments, name)
        if not low <= value <= high:  # also refuses NaN
            raise SettingsError(f"--{name.replace('_', '-')}: must be {low} to {high}, got {value}")
