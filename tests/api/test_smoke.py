"""deploy/smoke.sh: 0 for one streamed answer of a server that is ready in time, 1 with a reason for everything else."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.api.process import DEMO, ROOT, serving
from tests.env_lines import ENV_LINES

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

PIECE = 'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}\n\n'
LAST = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = "data: [DONE]\n\n"


def smoke(env_file: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = ("FORETOKEN_", "SMOKE_", "BIND_ADDRESS")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [str(ROOT / "deploy/smoke.sh"), *words],
        env={**environ, "SMOKE_ENV_FILE": str(env_file), "SMOKE_TIMEOUT_S": "30", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server with the demo model and two keys, the first one with a comma after it."""
    with serving(*DEMO, "--api-key", "smoke-key", "other", "--attention", "sdpa") as url:
        yield url


def test_a_real_server_passes_with_address_and_key_from_the_env_file(url: str, tmp_path: Path) -> None:
    port = url.removesuffix("/v1").rsplit(":", 1)[1]
    env_file = tmp_path / ".env"
    env_file.write_text(
        f"# a comment\nFORETOKEN_API_KEY='smoke-key,other'\nBIND_ADDRESS=127.0.0.1\nFORETOKEN_PORT={port}\n"
    )
    done = smoke(env_file)
    assert (done.returncode, done.stderr) == (0, "")
    assert "foretoken-demo streamed" in done.stdout


def test_a_wrong_key_is_told(url: str, tmp_path: Path) -> None:
    done = smoke(tmp_path / "none", url, FORETOKEN_API_KEY="wrong")
    assert done.returncode == 1
    assert "Incorrect API key" in done.stderr


def test_a_closed_port_is_told_by_its_whole_number(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port meanwhile
        for port in range(20000, 33000, 1000):
            with suppress(OSError):
                taken.bind(("127.0.0.1", port))
                break
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = smoke(tmp_path / "none", url, SMOKE_TIMEOUT_S="1")
    assert done.returncode == 1
    assert url.endswith("000")
    reason = rf"smoke: no server at {url}: curl: \(7\) .* port {url[-5:]} .*[a-z]"
    assert re.fullmatch(rf"{reason}; waiting up to 1 s\n{reason}\n", done.stderr)


@contextmanager
def fake(stream: str, statuses: Iterator[int], seen: list[str] | None = None) -> Iterator[str]:
    """URL of a server that answers `stream` to questions, `statuses` to GETs; keys that it is shown go into `seen`."""

    class Fake(BaseHTTPRequestHandler):
        def answer(self, status: int, text: str) -> None:
            if seen is not None:
                seen.append(self.headers["Authorization"].removeprefix("Bearer "))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.answer(next(statuses), '{"object":"list","data":[{"id":"fake","object":"model"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, stream)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "stream", "reason"),
    [
        (200, PIECE + LAST + DONE, ""),
        (404, PIECE + LAST + DONE, "/ready answers 404"),
        (200, PIECE + LAST, "has no end"),
        (200, PIECE + DONE, "has no finish reason"),
        (200, LAST + DONE, "has no text"),
        (200, 'data: {"error":{"message":"worker died"}}\n\n', "worker died"),
    ],
)
def test_what_is_not_one_whole_answer_is_told(status: int, stream: str, reason: str, tmp_path: Path) -> None:
    with fake(stream, itertools.repeat(status)) as url:
        done = smoke(tmp_path / "none", url)
    assert done.returncode == bool(reason)
    assert reason in done.stderr


def test_a_server_that_loads_is_waited_for(tmp_path: Path) -> None:
    with fake(PIECE + LAST + DONE, itertools.chain([503, 503], itertools.repeat(200))) as url:
        done = smoke(tmp_path / "none", url)
    told = f"smoke: {url}/ready answers 503: loading or draining; waiting up to 30 s\n"
    assert (done.returncode, done.stderr) == (0, told)


def test_a_server_that_loads_for_ever_is_told(tmp_path: Path) -> None:
    with fake("", itertools.repeat(503)) as url:
        done = smoke(tmp_path / "none", url, SMOKE_TIMEOUT_S="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"smoke: {url}/ready answers 503: loading or draining"


def test_a_host_that_does_not_exist_is_not_waited_for(tmp_path: Path) -> None:
    done = smoke(tmp_path / "none", "http://host.invalid:8000", SMOKE_TIMEOUT_S="100")
    assert done.returncode == 1
    assert re.fullmatch(r"smoke: no server at http://host.invalid:8000: curl: \(6\) .*[a-z]\n", done.stderr)


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    done = smoke(tmp_path / "none", SMOKE_TIMEOUT_S="1m")
    assert (done.returncode, done.stderr) == (1, "smoke: SMOKE_TIMEOUT_S must be whole seconds, not 1m\n")


@pytest.mark.parametrize("line", ENV_LINES)
def test_a_line_of_the_env_file_means_what_compose_takes_it_for(line: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"FORETOKEN_API_KEY=before\n{line}\n")
    seen: list[str] = []
    with fake(PIECE + LAST + DONE, itertools.repeat(200), seen) as url:
        assert smoke(tmp_path / ".env", url).returncode == 0
    assert set(seen) == {ENV_LINES[line]}
