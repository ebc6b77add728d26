"""What the bench beside the peers makes of its turns, and how it watches the servers that it started."""

from __future__ import annotations

import sys
import time

import pytest

from tests.bench.peers_http import same_start
from tests.bench.peers_report import compare, print_report, quiet_rounds
from tests.bench.serving import CpuWatch, Server, free_port


def turn(arm: str, round_name: str, speed: float, ttft: float, foreign: float = 0.0) -> dict[str, object]:
    return {
        "round": round_name,
        "concurrency": 1,
        "arm": arm,
        "tokens_per_s": speed,
        "ttft_ms": ttft,
        "tpot_ms": 1e3 / speed,
        "cores": 1.5,
        "foreign": foreign,
        "stolen": 0.0,
        "resident_mb": 100,
        "idle": {},
        "alike": 1.0,
    }


TURNS = [
    turn("ours", "0.0", 100, 30),
    turn("llama", "0.0", 50, 20),
    turn("vllm-1", "0.0", 80, 40),
    turn("ours", "0.1", 10, 300),
    turn("llama", "0.1", 50, 20, foreign=1.0),
    turn("vllm-1", "0.1", 80, 40),
    turn("ours", "0.2", 100, 30),
]


def test_a_disturbed_round_and_one_that_broke_off_do_not_count() -> None:
    kept, left_out = quiet_rounds(TURNS, 0.1)
    assert list(kept[1]) == ["0.0"]
    assert left_out == {1: 2}
    assert list(quiet_rounds(TURNS, 2.0)[0][1]) == ["0.0", "0.1"]


def test_ratios_are_medians_of_paired_rounds() -> None:
    rounds = quiet_rounds(TURNS, 2.0)[0][1]
    row = compare(rounds)["ours"]
    assert row["tokens_per_s"] == 55
    assert row["of_llama"] == pytest.approx((100 / 50 + 10 / 50) / 2)
    assert row["ttft_of_vllm-1"] == pytest.approx((30 / 40 + 300 / 40) / 2)


def test_speed_and_first_token_are_compared_with_the_best_peer_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(TURNS, 0.1)
    assert "ours: 1.25 of vllm-1's tokens/s, 1.50 of llama's TTFT" in capsys.readouterr().out


def test_same_start_is_the_share_before_the_first_difference() -> None:
    assert same_start("abcd", "abxd") == 0.5
    assert same_start("ab", "abcd") == 0.5
    assert same_start("", "") == 1.0


HTTP = """
import http.server, sys
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]], start_new_session=True)
"""


def test_a_grandchild_is_counted_and_ended_with_its_server() -> None:
    port = free_port()
    server = Server([sys.executable, "-c", PARENT, str(port), HTTP], port, "/", {})
    pids = list(server._family())
    assert len(pids) == 2
    watch = CpuWatch({"one": server})
    time.sleep(0.1)
    assert 0 <= watch.cores()["one"] < 0.5
    server.close()
    assert not server._family()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(is_running(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_ends_is_told_with_its_last_words() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(SystemExit, match=r"ended with 1\n.*no such model"):
        Server(command, free_port(), "/", {})
