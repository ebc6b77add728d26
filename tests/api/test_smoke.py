"""deploy/smoke.sh: 0 for one streamed answer of a real server, 1 with a reason for everything else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.api.process import ROOT, serving

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
    with serving("--api-key", "smoke-key", "other", "--attention", "sdpa") as url:
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


def test_a_closed_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        done = smoke(tmp_path / "none", f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "smoke: no server at http://127.0.0.1" in done.stderr


@pytest.mark.parametrize(
    ("status", "stream", "reason"),
    [
        (200, PIECE + LAST + DONE, ""),
        (503, PIECE + LAST + DONE, "/ready answers 503"),
        (200, PIECE + LAST, "has no end"),
        (200, PIECE + DONE, "has no finish reason"),
        (200, LAST + DONE, "has no text"),
        (200, 'data: {"error":{"message":"worker died"}}\n\n', "worker died"),
    ],
)
def test_what_is_not_one_whole_answer_is_told(status: int, stream: str, reason: str, tmp_path: Path) -> None:
    class Fake(BaseHTTPRequestHandler):
        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self) -> None:
            self.answer(status, '{"object":"list","data":[{"id":"fake","object":"model"}]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, stream)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        done = smoke(tmp_path / "none", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()
    assert done.returncode == bool(reason)
    assert reason in done.stderr
