"""The environment of every process that the API process starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from server.config import ENV_PREFIX


def child_environment() -> dict[str, str]:
    """Ours without settings, and so without API keys; what is importable here is importable there."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [path for path in (root, *sys.path) if path]
    ours = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
    return {**ours, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
