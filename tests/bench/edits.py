"""Small changes to a file, with the file as predicted output: tokens a step, and wall clock beside speculation off.

    python -m tests.bench.edits --url http://127.0.0.1:8000/v1 [--tasks 20]

Each task shows a running server the beginning of a module of Python's own library, 60 to 200 lines, and asks for all of
it with one function renamed. It is asked twice, neither time with anything kept of the other: with speculation off, and
with the shown text as `prediction`.
Prints a line for each task and the medians; the exit status is 1 if two texts differ.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

_MODULES = (
    "bisect", "calendar", "cmd", "codeop", "colorsys", "contextlib", "copy", "dis", "filecmp", "fnmatch", "fractions",
    "getopt", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac", "imghdr", "keyword", "linecache", "mimetypes",
    "netrc", "pprint", "queue", "quopri", "reprlib", "sched", "shelve", "shlex", "stat", "statistics", "string",
    "tabnanny", "textwrap", "timeit", "tokenize", "traceback", "uuid", "wave", "zipapp",
)  # fmt: skip
_LINES = (60, 200)


def tasks(most_lines: int) -> Iterator[tuple[str, str, str]]:
    """(module, text, name of one of its functions); texts end where a statement of the module does."""
    for module in _MODULES:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None or not found.origin.endswith(".py"):
            continue
        text = Path(found.origin).read_text(encoding="utf-8")
        ends = [node.end_lineno or 0 for node in ast.parse(text).body]
        end = max((line for line in ends if line <= most_lines), default=0)
        lines = text.splitlines()[:end]
        names = [node.name for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.FunctionDef)]
        if len(lines) >= _LINES[0] and names:
            yield module, "\n".join(lines) + "\n", names[0]


def ask(client: httpx.Client, body: dict[str, Any]) -> tuple[str, float, int, dict[str, Any]]:
    """(text, seconds, steps, usage). Raises: httpx.HTTPStatusError."""
    began = time.perf_counter()
    answer = client.post("chat/completions", json=body)
    seconds = time.perf_counter() - began
    answer.raise_for_status()
    told = answer.json()
    usage = told["usage"]
    steps = usage["completion_tokens"] - told["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"]
    return told["choices"][0]["message"]["content"], seconds, steps, usage


def main() -> int:
    """Ask, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1/")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--most-lines", type=int, default=_LINES[1], help="of a text")
    options = parser.parse_args()
    rows, began = [], time.time()
    with httpx.Client(base_url=options.url.rstrip("/") + "/", timeout=900) as client:
        model = client.get("models").json()["data"][0]["id"]
        for number, (module, text, name) in enumerate(list(tasks(options.most_lines))[: options.tasks]):
            words = f"Rename the function `{name}` to `{name}_now` in this file. Answer with the whole file alone.\n\n"
            usual = {
                "model": model,
                "messages": [{"role": "user", "content": f"{words}```python\n{text}```"}],
                "temperature": 0,
                "max_tokens": len(text) // 2,
            }
            arms = {
                "off": {"speculative": {"enabled": False, "metrics": True}},
                "on": {"prediction": {"type": "content", "content": text}, "speculative": {"metrics": True}},
            }
            order = sorted(arms, reverse=number % 2 == 1)
            told = {arm: ask(client, {**usual, **arms[arm], "cache_salt": f"{arm} {number} {began}"}) for arm in order}
            off, on = told["off"], told["on"]
            tokens, details = on[3]["completion_tokens"], on[3]["completion_tokens_details"]
            row = {
                "module": module,
                "lines": text.count("\n"),
                "tokens": tokens,
                "tokens_per_step": round(tokens / on[2], 2),
                "on_over_off": round(off[1] / on[1], 2),
                "accepted": details["accepted_prediction_tokens"],
                "rejected": details["rejected_prediction_tokens"],
                "is_same": off[0] == on[0],
            }
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep="   ", flush=True)
    medians = {key: statistics.median(float(row[key]) for row in rows) for key in ("tokens_per_step", "on_over_off")}
    print(json.dumps({"bench": "edits", "tasks": len(rows), **medians}))
    return int(not all(row["is_same"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
