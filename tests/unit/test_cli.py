from __future__ import annotations

import subprocess
import sys
import time

import pytest

from server.cli import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"foretoken {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serv"], "no such command: serv; did you mean serve?"),
        (["serve", "--revision", "v2"], "--revision v2: names a version of a Hub model, and no model is given"),
        (
            ["serve", "--api-key", "k", "org/name"],
            "--api-key ends in org/name: it takes every word after it, so write MODEL first",
        ),
        (["serve", "m", "--max-model-length", "5"], "did you mean max-model-len?"),
        (["serve", "m", "--max-model", "5"], "no such setting"),
        (["serve", "m", "--port", "99999"], "--port: must be at most 65535"),
        (["serve", "m", "--port"], "--port: expected one argument"),
        (["serve", "a", "--model", "b"], "two models"),
        (["serve", "a", "b"], "one argument too many: b"),
        (["bench", "--prompts", "x", "--concurency", "1"], "did you mean --concurrency"),
        (["chat", "--uri", "x"], "did you mean --url"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORETOKEN_MODEL", raising=False)
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_does_not_import_torch_and_is_quick() -> None:
    code = (
        "import sys\nfrom server.cli import main\nmain(['--help'])\n"
        "assert not {'torch', 'transformers', 'fastapi', 'numpy', 'yaml', 'httpx'} & set(sys.modules)"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - begin < 5
