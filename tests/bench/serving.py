"""What the benches of servers share: a server as a child process, a turn of requests over HTTP, who used the CPU."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.commands.bench_http import Answer, Target, post_stream
from server.commands.bench_prompts import PATHS, Prompt

_READY_S = 900
"""Beside busy programs compiling takes many minutes."""
_ANSWER_S = 600
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """A child process, and its own children, that serve HTTP on `port`. Owns them: `close` ends all."""

    def __init__(self, command: Sequence[str], port: int, ready: str, environ: dict[str, str]) -> None:
        """Raises SystemExit with the end of what it wrote if `ready` does not answer 200 in time."""
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        self.child = subprocess.Popen(command, env={**os.environ, **environ}, stdout=self._log, stderr=self._log)
        try:
            self._await(f"http://127.0.0.1:{port}{ready}")
        except BaseException:
            self.close()
            raise

    def _await(self, url: str) -> None:
        program = " ".join(self.child.args) if isinstance(self.child.args, list) else str(self.child.args)
        deadline = time.monotonic() + _READY_S
        with httpx.Client(timeout=5) as client:  # one for all calls: to make it takes 60 ms of a core
            while time.monotonic() < deadline:
                if self.child.poll() is not None:
                    raise SystemExit(f"{program}: ended with {self.child.returncode}\n{self._tail()}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(url).status_code == 200:
                        return
                time.sleep(0.1)
        raise SystemExit(f"{program}: not ready within {_READY_S} s\n{self._tail()}")

    def _tail(self) -> str:
        """The end of what it wrote."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]

    def close(self) -> None:
        """Ask it to end, then end whatever is left of it and of what it started."""
        family = list(self._family())
        if self.child.poll() is None:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(20)
        for pid in family if self.child.poll() is None else family[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()
        self._log.close()

    def usage(self) -> tuple[float, int]:
        """(CPU seconds so far, resident bytes) of the child and of what it started."""
        family = self._family().values()
        cpu_s = sum(sum(map(int, fields[11:15])) for fields in family) * _TICK_S
        return cpu_s, sum(int(fields[21]) for fields in family) * os.sysconf("SC_PAGE_SIZE")

    def _family(self) -> dict[int, list[str]]:
        """By process id, the child first: the fields of /proc/ID/stat from the state on."""
        found: dict[int, list[str]] = {}
        parents: dict[int, list[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            found[int(folder.name)] = fields
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
        family: dict[int, list[str]] = {}
        waiting = [self.child.pid] if self.child.pid in found else []
        while waiting:
            pid = waiting.pop()
            family[pid] = found[pid]
            waiting += parents.get(pid, [])
        return family


@dataclass(frozen=True, slots=True)
class Turn:
    """The answers to one arm's share of prompts, in the prompts' order."""

    answers: tuple[Answer, ...]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_completion for answer in self.answers) / self.wall_s


def ask(url: str, prompts: Sequence[Prompt], concurrency: int, fields: dict[str, Any], api_key: str = "") -> Turn:
    """Stream an answer to each prompt, `concurrency` at a time, greedily. Raises SystemExit at the first error."""
    return asyncio.run(_ask(Target.parse(url, api_key), prompts, concurrency, fields))


async def _ask(target: Target, prompts: Sequence[Prompt], concurrency: int, fields: dict[str, Any]) -> Turn:
    answers: dict[int, Answer] = {}
    waiting = iter(enumerate(prompts))
    common = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **fields}

    async def seat() -> None:
        for index, prompt in waiting:
            body = json.dumps({**prompt.body(), **common}).encode()
            answers[index] = await post_stream(target, PATHS[prompt.endpoint], body, _ANSWER_S)

    began = time.perf_counter()
    await asyncio.gather(*(seat() for _ in range(concurrency)))
    wall_s = time.perf_counter() - began
    for answer in answers.values():
        if answer.error and not answer.num_completion:  # transformers serve sends usage last and no [DONE]
            raise SystemExit(f"{target.host}:{target.port}: {answer.error}")
    return Turn(tuple(answers[index] for index in range(len(prompts))), wall_s)


class CpuWatch:
    """Whose CPU time went by since it was made: the machine's, this process's and each server's. Owns the readings."""

    def __init__(self, servers: dict[str, Server]) -> None:
        self._servers = servers
        self._began = time.perf_counter()
        self._first = self._read()

    def cores(self) -> dict[str, float]:
        """Mean cores used since then by each server, by "client" (this process), by "foreign" (all else that runs
        here) and by "stolen" (what the machine's host kept)."""
        wall_s = time.perf_counter() - self._began
        now = self._read()
        used = {name: (now[name] - self._first[name]) / wall_s for name in now}
        used["foreign"] = used.pop("busy") - sum(used[name] for name in [*self._servers, "client"])
        return used

    def _read(self) -> dict[str, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, _, _, irq, soft_irq, stolen = fields[:8]
        own = os.times()
        seconds = {name: server.usage()[0] for name, server in self._servers.items()}
        seconds["client"] = own.user + own.system
        seconds["busy"] = (user + nice + system + irq + soft_irq) * _TICK_S
        seconds["stolen"] = stolen * _TICK_S
        return seconds
