"""The whole server as a process: ready line, drain on SIGTERM, a second signal, and starts that cannot work."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.cli import main
from server.commands.serve import House, bind, numbers_of, serve, told_address
from server.config import Settings
from server.errors import StartupError
from server.messages import Ready
from tests.api.process import Process, encoders_of, workers_of


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def go(*words: str) -> Process:
        running.append(Process(*words))
        return running[-1]

    yield go
    for process in running:
        if process.child.poll() is None:
            process.child.kill()
            process.child.wait()
            if process.child.stderr is not None:
                process.child.stderr.close()


def story(url: str, max_tokens: int) -> Iterator[str]:
    body = {
        "model": "tiny1m",
        "prompt": "Once upon a time",
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        yield from (line for line in response.iter_lines() if line.startswith("data:"))


def test_a_signal_lets_running_answers_end_and_admits_no_more(shared: Path, start: Callable[..., Process]) -> None:
    process = start(str(shared / "models/tiny1m"), "--max-num-seqs", "4")
    url = process.url()
    assert httpx.get(url.replace("/v1", "/ready")).status_code == 200
    (worker,) = workers_of(process.child.pid)
    lines = story(url, 230)
    first = next(lines)
    process.child.send_signal(signal.SIGTERM)
    rest = list(lines)
    assert "error" not in "".join([first, *rest])
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in "".join(rest)
    code, err = process.end()
    assert code == 0, err
    assert not Path(f"/proc/{worker}").exists()


def test_a_second_signal_does_not_wait(shared: Path, start: Callable[..., Process]) -> None:
    process = start(str(shared / "models/booking5m"), "--attention", "sdpa", "--drafter", "none")
    url = process.url()
    body = {"model": "booking5m", "prompt": "Hello", "max_tokens": 1000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.child.send_signal(signal.SIGTERM)
        while httpx.get(url.replace("/v1", "/ready"), timeout=10).status_code != 503:
            time.sleep(0.01)
        assert httpx.post(f"{url}/completions", json=body, timeout=10).status_code == 503
        process.child.send_signal(signal.SIGTERM)
        last = [line for line in lines if line.startswith("data:")]
    assert "engine_unavailable" in last[-2]
    assert last[-1] == "data: [DONE]"
    code, err = process.end()
    assert code == 1, err


SLOW = ("models/booking5m", "--attention", "sdpa", "--drafter", "none")
LONG = {"model": "booking5m", "prompt": "Hello", "max_tokens": 1000, "stream": True, "ignore_eos": True}


def test_a_drain_that_cuts_answers_off_says_so(shared: Path, start: Callable[..., Process]) -> None:
    folder, *words = SLOW
    process = start(str(shared / folder), *words, "--max-num-seqs", "1", "--drain-timeout-s", "0.3")
    url = process.url()
    with (
        httpx.stream("POST", f"{url}/completions", json=LONG, timeout=60) as running,
        httpx.stream("POST", f"{url}/completions", json=LONG, timeout=60) as waiting,
    ):
        process.child.send_signal(signal.SIGTERM)
        assert all("engine_unavailable" in response.read().decode() for response in (running, waiting))
    code, err = process.end()
    assert code == 1, err
    assert err.count("2 answers are cut off") == 1


def test_a_drain_waits_for_the_worker_that_takes_over(shared: Path, start: Callable[..., Process]) -> None:
    folder, *words = SLOW
    process = start(str(shared / folder), *words)
    url = process.url()
    body = {**LONG, "max_tokens": 40, "temperature": 0}
    expected = httpx.post(f"{url}/completions", json={**body, "stream": False}, timeout=60).json()["choices"][0]
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        (worker,) = workers_of(process.child.pid)
        os.kill(worker, signal.SIGKILL)
        while httpx.get(url.replace("/v1", "/ready"), timeout=10).status_code != 503:
            time.sleep(0.005)
        process.child.send_signal(signal.SIGTERM)
        events = [line for line in [first, *lines] if line.startswith("data:")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == expected["text"]
    code, err = process.end()
    assert code == 0, err


def test_a_server_that_gave_its_worker_up_ends(shared: Path, start: Callable[..., Process]) -> None:
    folder, *words = SLOW
    process = start(str(shared / folder), *words)
    url = process.url()
    with httpx.stream("POST", f"{url}/completions", json=LONG, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        killed: set[int] = set()
        while len(killed) < 3:
            for worker in set(workers_of(process.child.pid)) - killed:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
            time.sleep(0.02)
        last = [line for line in lines if line.startswith("data:")]
    assert "died 3 times" in last[-2]
    assert httpx.get(url.replace("/v1", "/health"), timeout=10).status_code == 503
    counts = httpx.get(url.replace("/v1", "/metrics"), timeout=10).text
    assert 'foretoken_requests_total{finish_reason="error"} 1.0' in counts
    code, err = process.end()
    assert code == 1, err
    assert err.count("no worker is left, the server ends: the worker process died 3 times") == 1


def test_a_broken_model_is_one_line(shared: Path, tmp_path: Path, start: Callable[..., Process]) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(shared / "models/tiny1m", folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    code, err = start(str(folder)).end()
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "cannot load the weights" in err


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere"])
def test_a_missing_model_is_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", name, "--port", "0"]) == 2
    err = capfd.readouterr().err
    assert name in err
    assert err.count("\n") == 1


def send_headers(client: socket.socket, num_bytes: int) -> None:
    for _ in range(num_bytes // 10_000):
        client.sendall(b"X-Filler: " + b"a" * 10_000 + b"\r\n")
        time.sleep(0.002)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"


def test_headers_are_bounded_and_nothing_that_is_rendered_keeps_the_server(
    shared: Path, tmp_path: Path, start: Callable[..., Process]
) -> None:
    shutil.copytree(shared / "models/tiny1m", tmp_path / "tiny1m")
    (tmp_path / "tiny1m/chat_template.jinja").write_text(ENDLESS)
    process = start(str(tmp_path / "tiny1m"))
    url = httpx.URL(process.url())
    with socket.create_connection(("127.0.0.1", url.port or 0), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_headers(client, num_bytes=2_000_000)
    assert httpx.get(url.copy_with(path="/health")).status_code == 200
    body = {"model": "tiny1m", "messages": [{"role": "user", "content": "x"}]}
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(httpx.post, f"{url}/chat/completions", json=body, timeout=60) for _ in range(3)]
        while not _is_working(process.child.pid):
            time.sleep(0.05)
        process.child.send_signal(signal.SIGINT)
        told = time.monotonic()
        assert [future.result().status_code for future in asked] == [503] * 3
        assert process.end()[0] == 0
    assert time.monotonic() - told < 9, "a template has ten seconds"


def _is_working(pid: int) -> bool:
    """Whether a child that encodes prompts computes."""
    states = [Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] for child in encoders_of(pid)]
    return states.count("R") > 0


@pytest.mark.parametrize(
    ("host", "keys", "num_lines"),
    [("0.0.0.0", (), 1), ("0.0.0.0", ("k",), 0), ("127.0.0.1", (), 0), ("localhost", (), 0)],
)
def test_a_door_without_keys_is_told(
    host: str,
    keys: tuple[str, ...],
    num_lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run(house: House) -> int:
        return 0

    monkeypatch.setattr(House, "run", run)
    assert serve(Settings(model="m", host=host, port=0, api_key=keys)) == 0
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == num_lines
    assert all("no --api-key" in line for line in told)


def test_connections_stay_open_longer_than_the_pools_of_proxies() -> None:
    listener = socket.socket()
    for settings, wanted in ((Settings(), 75), (Settings(idle_connection_s=9), 9)):
        assert House(settings, listener)._http_config(FastAPI()).timeout_keep_alive == wanted
    listener.close()


def test_a_flag_that_overrules_the_port_of_the_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run(house: House) -> int:
        return 0

    monkeypatch.setattr(House, "run", run)
    monkeypatch.setenv("FORETOKEN_PORT", "8000")
    assert serve(Settings(model="m", port=0)) == 0
    assert "--port 0 wins over FORETOKEN_PORT=8000" in caplog.text
    caplog.clear()
    monkeypatch.setenv("FORETOKEN_PORT", "0")
    assert serve(Settings(model="m", port=0)) == 0
    assert "FORETOKEN_PORT" not in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_address_stands_in_its_file_while_the_server_listens(
    host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "address"
    listener = bind(host, 0)
    with listener, told_address(str(file), listener):
        assert file.read_text() == f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert not file.exists()
    with bind(host, 0) as listener, told_address(str(tmp_path / "nowhere/address"), listener):
        assert "--address-file" in caplog.text


def test_a_taken_port_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "some-model", "--port", str(port)]) == 2
    err = capfd.readouterr().err
    assert f"port {port} on 127.0.0.1 is in use" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("dtype", "is_told"), [("float32", False), ("bfloat16", True), ("float16", True)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_ready_line_tells_where_answers_may_differ(dtype: str, device: str, is_told: bool) -> None:
    told = numbers_of(Ready(256, 97, ("none",), device, dtype))
    assert told.startswith(f"{dtype} on {device}")
    assert ("answers may differ at near-ties" in told) == is_told
    assert ("not measured" in told) == (not is_told and device == "cuda")
    invariant = numbers_of(Ready(256, 97, ("none",), device, dtype, is_row_invariant=True))
    assert invariant == f"{dtype} on {device}", "no text depends on speculation"


class _Loading:
    """An engine whose worker loads for ever, or has refused."""

    reason: str | None = None

    def __init__(self, *_: object, **__: object) -> None:
        self.is_closed = False
        loading.append(self)

    async def start(self) -> None:
        pass

    async def wait_dead(self) -> str:
        if self.reason is None:
            await asyncio.Event().wait()
        assert self.reason is not None
        return self.reason

    async def close(self) -> None:
        self.is_closed = True


loading: list[_Loading] = []


@pytest.mark.parametrize("reason", [None, "the model is broken"])
def test_a_tokenizer_that_is_never_read_keeps_nobody(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    never = threading.Event()
    monkeypatch.setattr("server.commands.serve.Scribe", lambda settings: never.wait())
    monkeypatch.setattr("server.commands.serve.Engine", _Loading)
    monkeypatch.setattr(_Loading, "reason", reason)

    async def run() -> int:
        if reason is None:
            asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        return await House(Settings(model="m"), listener).run()

    with bind("127.0.0.1", 0) as listener:
        if reason is None:
            assert asyncio.run(run()) == 0
        else:
            with pytest.raises(StartupError, match=reason):
                asyncio.run(run())
    assert loading[-1].is_closed
    never.set()
