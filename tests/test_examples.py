"""Every code block of the documents is run against a real server, or carries a mark that says why not."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

import drafters
from server import default_model
from server.cli import COMMANDS
from server.config import Settings, load
from server.messages import Outcome
from server.metrics import Metrics
from server.worker.loading import DrafterNeeds, load_drafters
from tests.api.process import DEMO, ROOT, serving
from tests.doc_blocks import DOCUMENTS, Block, blocks, commands
from tests.fakes import FakeGeometry, FakeVerifier, make_loop, submit_of

BLOCKS = blocks()
LANGUAGES = ("sh", "python", "json", "yaml", "promql")
DOCUMENTED = "127.0.0.1:8000"
SMALL_BENCH = "--rounds 1 --concurrency 1 --warmup 1 --num-prompts 2 --max-tokens 8"

WRAPPER = """#!/bin/sh
case "$1" in
  bench) exec "{python}" -m server.cli "$@" --url {url} {small} ;;
  chat) exec "{python}" -m server.cli "$@" --url {url} --max-tokens 16 ;;
  build-trigram) exec "{python}" -m server.cli "$@" --quiet ;;
  *) exec "{python}" -m server.cli "$@" ;;
esac
"""


def of(*languages: str, runs: bool = True) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language in languages and (block.reason is None or not runs)]
    return [pytest.param(block, id=block.id) for block in chosen]


# ---- marks, and what can be told without a server


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(BLOCKS) > 20
    silent = [block.id for block in BLOCKS if block.reason is None and block.language not in LANGUAGES]
    assert silent == [], "mark with <!-- not run: why --> on the line before"
    assert [block.id for block in BLOCKS if block.reason is not None and len(block.reason) < 8] == []


@pytest.mark.parametrize("block", of("sh", runs=False))
def test_shell_blocks_parse(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text.replace("<this repository>", "URL"), text=True)
    assert done.returncode == 0


def options_of(command: str) -> set[str]:
    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize(("document", "command"), sorted(set(commands())))
def test_commands_and_their_flags_exist(document: str, command: str) -> None:
    command = re.sub(r"^(\w+=\S+ )+", "", command.split(" #")[0].strip())
    words = shlex.split(re.sub(r"[<>\[\]]", " ", command))
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), command
    elif words[0] == "python":
        found = importlib.util.find_spec(words[2])
        assert found is not None, f"{document}: no module {words[2]}"
        assert found.origin is not None
        source = Path(found.origin).read_text(encoding="utf-8")
        assert [flag for flag in flags if flag != "--help" and f'"{flag}"' not in source] == [], command
    elif len(words) > 1 and words[1] != "COMMAND":
        assert words[1] in COMMANDS or words[1] in ("--help", "--version"), f"{document}: {command}"
        known = options_of(words[1]) if words[1] in COMMANDS else {"--help", "--version"}
        assert [flag for flag in flags if flag not in known] == [], f"{document}: {command}"


def test_make_serve_starts_the_server() -> None:
    done = subprocess.run(["make", "-n", "serve", "MODEL=a b"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bin/foretoken serve 'a b'" in done.stdout


@pytest.mark.parametrize("block", of("yaml"))
def test_settings_files_are_taken(block: Block, tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text(block.text)
    values = yaml.safe_load(block.text)
    settings = load({"config": str(tmp_path / "server.yaml")}, {})
    assert settings.model == values["model"]
    assert settings.max_num_seqs == values["max_num_seqs"]


def test_the_proxy_example_fits_the_settings() -> None:
    (block,) = [block for block in BLOCKS if block.language == "nginx"]
    size = re.search(r"client_max_body_size (\d+)m;", block.text)
    wait = re.search(r"proxy_read_timeout (\d+)s;", block.text)
    assert size is not None
    assert wait is not None
    assert int(size[1]) * 2**20 == Settings().max_body_bytes
    assert float(wait[1]) > 2 * Settings().keep_alive_s
    patience_s = openai.DEFAULT_TIMEOUT.read
    assert patience_s is not None
    assert float(wait[1]) >= patience_s, "an answer that is not streamed is silent until its end"
    assert "proxy_buffering off;" in block.text


def test_the_other_proxy_example_takes_the_same_bodies() -> None:
    (block,) = [block for block in BLOCKS if block.language == "caddy"]
    size = re.search(r"max_size (\d+)MiB$", block.text, re.MULTILINE)
    assert size is not None
    assert int(size[1]) * 2**20 == Settings().max_body_bytes
    idle = re.search(r"keepalive (\d+)s ", block.text)
    assert idle is not None
    assert int(idle[1]) < Settings().idle_connection_s
    assert f"`--idle-connection-s` ({Settings().idle_connection_s})" in (ROOT / "docs/operations.md").read_text()


def metric_names() -> set[str]:
    """Every name of the server's metrics, with the endings that PromQL puts behind a histogram's."""
    names = {family.name for family in Metrics().registry.collect()}
    return names | {name + ending for name in names for ending in ("_total", "_bucket", "_sum", "_count")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_real_metrics(document: Path) -> None:
    # A name that goes on with a dash is one of a volume.
    told = set(re.findall(r"\bforetoken_[a-z_]+[a-z]\b(?!-)", document.read_text(encoding="utf-8")))
    assert sorted(told - metric_names()) == []


@pytest.mark.parametrize("block", of("promql"))
def test_queries_name_a_metric_and_parse(block: Block, tmp_path: Path) -> None:
    query = "".join(line for line in block.text.splitlines() if not line.startswith("#"))
    assert re.search(r"\bforetoken_\w+", query)
    assert all(query.count(left) == query.count(right) for left, right in ("()", "[]", "{}"))
    if (promtool := shutil.which("promtool")) is not None:
        rule = {"record": "documented:query", "expr": query}
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "documented", "rules": [rule]}]}))
        done = subprocess.run([promtool, "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ---- what needs a server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Base URL of a server with the small model, also under the name that the documents use."""
    with serving(*DEMO, default_model.NAME) as url:
        yield url


@pytest.fixture(scope="module")
def place(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone, with the program on the path beside it and the corpus of docs/drafters.md."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("docs", "server"):
        (folder / name).symlink_to(ROOT / name)
    program = folder / "bin/foretoken"
    program.parent.mkdir()
    program.write_text(WRAPPER.format(python=sys.executable, url=url, small=SMALL_BENCH))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (row,) = [block.text for block in BLOCKS if block.document == "docs/drafters.md" and block.language == "json"]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps(json.loads(row)) for _ in range(3)) + "\n")
    return folder


def environ(place: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("FORETOKEN_", "OPENAI_"))}
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**ours, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def there(text: str, url: str) -> str:
    """`text` with the address of the documents replaced by the server's."""
    return text.replace(DOCUMENTED, url.removeprefix("http://").removesuffix("/v1"))


@pytest.mark.parametrize("block", of("sh"))
def test_shell_blocks_run(block: Block, url: str, place: Path) -> None:
    words = ["bash", "-euo", "pipefail", "-c", there(block.text, url)]
    done = subprocess.run(words, cwd=place, env=environ(place), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error":{' not in done.stdout  # a response that went well has an `error` of null
    if "curl -N" in block.text:
        assert done.stdout.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("block", of("python"))
def test_python_blocks_run(block: Block, url: str, place: Path) -> None:
    words = [sys.executable, "-c", there(block.text, url)]
    done = subprocess.run(words, cwd=place, env=environ(place), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "OpenAI" not in block.text


@pytest.mark.parametrize("block", of("json"))
def test_request_bodies_are_taken(block: Block, url: str) -> None:
    fields = json.loads(block.text)
    usual = {"model": "foretoken-demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    response = httpx.post(f"{url}/chat/completions", json={**usual, **fields}, timeout=60)
    assert response.status_code == 200, response.text


# ---- the drafter of docs/drafters.md


class Refrain(FakeVerifier):
    """A target whose text repeats itself every seven tokens, but for one token in nine."""

    def _choose(self, row: Any, value: int, length: int) -> int:
        return value % 50 if value % 9 == 0 else (3, 14, 15, 9, 26, 5, 35)[length % 7]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the documented class is entered in the registry."""
    (block,) = [block for block in BLOCKS if block.text.startswith("# drafters/repeat.py")]
    (line,) = [block.text for block in BLOCKS if '"drafters.repeat:' in block.text]
    module = types.ModuleType("drafters.repeat")
    exec(compile(block.text, "docs/drafters.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "drafters.repeat", module)
    entry: dict[str, str] = eval("{" + line.strip() + "}")
    for name, where in entry.items():
        monkeypatch.setitem(drafters.OTHERS, name, where)
    assert len(block.text.splitlines()) <= 40
    return next(iter(entry))


def answers(drafter: str) -> tuple[list[list[int]], int, int]:
    """Tokens of three answers run together, how many guesses were accepted, how many rows failed."""
    geometry = FakeGeometry(num_pages=400)
    loop = make_loop(geometry, load_drafters(DrafterNeeds(Settings(max_num_seqs=geometry.max_rows), 50)))
    loop._verifier = Refrain(geometry)
    for number in range(3):
        loop.handle(submit_of([1, 2, number], f"r{number}", drafter=drafter, max_tokens=90))
    outcomes: list[Outcome] = []
    while loop.has_work:
        outcomes.append(loop.step())
    texts = [[t for o in outcomes for d in o.deltas if d.id == f"r{number}" for t in d.tokens] for number in range(3)]
    stats = [outcome.stats for outcome in outcomes if outcome.stats is not None]
    return texts, sum(one.num_accepted for one in stats), sum(one.num_drafter_failures for one in stats)


def test_the_documented_drafter_wins_tokens_and_changes_no_text(registered: str) -> None:
    plain, nothing, _ = answers("none")
    texts, num_accepted, num_failures = answers(registered)
    assert nothing == 0
    assert num_failures == 0
    assert [len(text) for text in texts] == [90, 90, 90]
    assert texts == plain
    assert num_accepted > 90, "a third of the text at least comes from guesses"
