"""One `foretoken serve` as a child process, for tests that talk to a real server."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server import demo

ROOT = Path(__file__).resolve().parents[2]
LOAD_S = 120.0
DEMO = (
    "--model", str(demo.MODEL), "--trigram-table", str(demo.TRIGRAM_TABLE), "--ctc-head", str(demo.CTC_HEAD),
    "--served-model-name", demo.NAME,
)  # fmt: skip
"""The small model with its drafter files, whatever is served by default here; more names may follow."""


FLAGS = ("--port", "0", "--wait-for-compile", "--log-level", "warning")
"""For every server here; what a test passes comes later, and so wins."""

KEPT = {"FORETOKEN_RESERVE_WORKER": "false"}
"""Tests count processes, and know the worker by being the only one."""


class Process:
    """One `foretoken serve`. Owns the child process and what it printed."""

    def __init__(self, *words: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FORETOKEN_")}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "serve", *FLAGS, *words],
            cwd=ROOT,
            env={**environ, "OMP_NUM_THREADS": "1", "FORETOKEN_THREADS": "1", "FORETOKEN_COMPILE": "false", **KEPT},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        assert self.child.stdout is not None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        with self.child.stdout as out:
            for line in out:
                self._lines.put(line)

    def url(self) -> str:
        """The URL of the ready line."""
        line = self._lines.get(timeout=LOAD_S)
        assert line.startswith("foretoken: ready at http://127.0.0.1:")
        return line.split(" at ")[1].split(" ")[0]

    def end(self) -> tuple[int, str]:
        """(exit code, stderr) after the process has ended by itself."""
        assert self.child.stderr is not None
        with self.child.stderr as err:
            text = err.read()
        return self.child.wait(timeout=30), text


@contextmanager
def serving(*words: str) -> Iterator[str]:
    """The base URL of a server that must end well; it is gone afterwards, whatever happened."""
    process = Process(*words)
    try:
        yield process.url()
        process.child.send_signal(signal.SIGTERM)
        code, err = process.end()
        assert code == 0, err
    finally:
        if process.child.poll() is None:
            process.child.kill()
            process.child.wait()


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def workers_of(pid: int) -> list[int]:
    """Children that hold a model, not those that encode prompts."""
    return [child for child in children_of(pid) if b"server.worker" in _command(child)]


def encoders_of(pid: int) -> list[int]:
    """Children that render and encode prompts."""
    return [child for child in children_of(pid) if b"server.prompt_process" in _command(child)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
