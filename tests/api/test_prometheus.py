"""A real Prometheus, told what deploy/ tells it, watches a real server under mixed load: every expression has data."""

from __future__ import annotations

import asyncio
import math
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server import demo
from tests.api.process import DEMO, serving
from tests.watched import BOARDS, PROMETHEUS, board_expressions, read_board, rules, without_comparisons

LOAD_S = float(os.environ.get("FORETOKEN_PROMETHEUS_LOAD_S", "20"))
WINDOW = "10s"
KEYS = ("first-key", "second-key")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="no prometheus and promtool here: on Debian install the package prometheus",
    ),
]


def quick(expression: str) -> str:
    """An expression with windows that a short load fills, and the variables of the boards in place."""
    expression = expression.replace("$__rate_interval", WINDOW).replace("$instance", ".*")
    expression = re.sub(r"\[\d+[smh]\]", f"[{WINDOW}]", expression)
    return re.sub(r"offset \d+[smh]", "offset 3s", expression)


def write_config(folder: Path, target: str, own: str) -> Path:
    """deploy's configuration with real addresses, a scrape each second, and rules that look at seconds."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for scrape in config["scrape_configs"]:
        scrape["static_configs"] = [{"targets": [target if scrape["job_name"] == "foretoken" else own]}]
    (folder / "rules").mkdir()
    for path in (PROMETHEUS / "rules").glob("*.yml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for group in content["groups"]:
            group["interval"] = "1s"
            for rule in group["rules"]:
                rule["expr"] = quick(rule["expr"])
        (folder / "rules" / path.name).write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "prometheus.yml"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Prometheus:
    """One Prometheus of the test's own. Owns the process and its folder."""

    def __init__(self, folder: Path, target: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        config = write_config(folder, target, self.address)
        with open(folder / "log", "w", encoding="utf-8") as log:
            self.child = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
            )
        self._log = folder / "log"

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(300):
            assert self.child.poll() is None, self._log.read_text(encoding="utf-8")
            try:
                if httpx.get(f"http://{self.address}/-/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self._log.read_text(encoding="utf-8"))

    def ask(self, expression: str, since: float, until: float) -> list[dict[str, Any]]:
        """Series of the expression between two times, a value for each second."""
        asked = {"query": expression, "start": since, "end": until, "step": "1"}
        answer = httpx.post(f"http://{self.address}/api/v1/query_range", data=asked, timeout=30).json()
        assert answer["status"] == "success", (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def close(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def order(number: int) -> tuple[str, dict[str, Any]]:
    """Route and body of the load's request `number`: chat and completions, streamed and not, greedy and drawn."""
    people, kind = number % 7 + 2, number % 6
    body: dict[str, Any] = {"model": demo.NAME, "max_tokens": 16 + 8 * (number % 5)}
    body |= {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
    if kind in (0, 1, 2, 3):
        body["messages"] = [{"role": "user", "content": f"Find me a table for {people} people tonight."}]
        body["stream"] = kind < 3
        return "chat/completions", body
    body["prompt"] = f"I need a flight for {people} people from Paris to London next Friday. " * 4
    body["stream"] = kind == 4
    return "completions", body


async def one(client: httpx.AsyncClient, number: int) -> int:
    """Send one request of the load; the status of its answer."""
    headers = {"Authorization": f"Bearer {KEYS[number % 2]}"}
    if number % 10 == 9:
        return (
            await client.post("chat/completions", json={"model": demo.NAME, "messages": 3}, headers=headers)
        ).status_code
    if number % 10 == 8:
        return (await client.post("completions", json={}, headers={"Authorization": "Bearer nobody"})).status_code
    route, body = order(number)
    if body["stream"] and number % 15 == 6:
        async with client.stream("POST", route, json=body, headers=headers) as response:
            async for _ in response.aiter_lines():
                return response.status_code  # and is gone
    return (await client.post(route, json=body, headers=headers)).status_code


async def load(url: str, seconds: float) -> dict[int, int]:
    """Requests of 1, 6 and 3 clients at a time, a third of the time each; how often each status came."""
    statuses: dict[int, int] = {}
    numbers = iter(range(1_000_000))
    async with httpx.AsyncClient(base_url=f"{url}/", timeout=60) as client:
        for num_clients in (1, 6, 3):
            until = time.monotonic() + seconds / 3

            async def client_loop(end: float = until) -> None:
                while time.monotonic() < end:
                    status = await one(client, next(numbers))
                    statuses[status] = statuses.get(status, 0) + 1

            await asyncio.gather(*(client_loop() for _ in range(num_clients)))
    return statuses


class Watched:
    """What came of the load: the Prometheus that watched it, and from when until when."""

    def __init__(self, prometheus: Prometheus, since: float, until: float) -> None:
        self.prometheus, self.since, self.until = prometheus, since, until

    def has_data(self, expression: str) -> bool:
        """Whether a series of the expression has a finite value at some second of the load."""
        series = self.prometheus.ask(expression, self.since, self.until)
        return any(math.isfinite(float(value)) for found in series for _, value in found["values"])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with ExitStack() as stack:
        url = stack.enter_context(serving(*DEMO, "--api-key", *KEYS, "--max-num-seqs", "4"))
        target = url.removeprefix("http://").removesuffix("/v1")
        prometheus = stack.enter_context(closing(Prometheus(tmp_path_factory.mktemp("prometheus"), target)))
        prometheus.wait()
        since = time.time()
        statuses = asyncio.run(load(url, LOAD_S))
        time.sleep(2)  # a last scrape, and the rules after it
        assert set(statuses) == {200, 400, 401}, statuses
        assert statuses[200] >= 10, statuses
        yield Watched(prometheus, since, time.time())


def promtool(*words: str) -> None:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_passes_the_configuration() -> None:
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    promtool("check", "rules", *map(str, sorted((PROMETHEUS / "rules").glob("*.yml"))))


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", *map(str, sorted((PROMETHEUS / "tests").glob("*.yml"))))


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_panel_has_data(path: Path, watched: Watched) -> None:
    empty = [where for where, asked in board_expressions(read_board(path)) if not watched.has_data(quick(asked))]
    assert empty == []


def test_every_recording_rule_makes_samples(watched: Watched) -> None:
    assert [rule["record"] for rule in rules("recording") if not watched.has_data(rule["record"])] == []


def test_every_alert_has_something_to_look_at(watched: Watched) -> None:
    """Without its comparisons an alert's expression gives the vectors that it compares."""
    alerts = [(rule["alert"], quick(without_comparisons(rule["expr"]))) for rule in rules("alerts")]
    assert [name for name, asked in alerts if not watched.has_data(asked)] == []


def test_a_server_that_is_well_raises_no_alert(watched: Watched) -> None:
    names = "|".join(("ForetokenServerDown", "ForetokenNoWorker", "ForetokenWorkerRestarting", "ForetokenErrors"))
    raised = watched.prometheus.ask(f'ALERTS{{alertname=~"{names}"}}', watched.since, watched.until)
    assert raised == []
