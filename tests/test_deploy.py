"""Image and compose: what holds without a Docker engine. Checks by docker compose and hadolint run where they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.commands.serve import bind, told_address
from server.config import ENV_PREFIX, Settings, setting_names
from tests.env_lines import ENV_LINES

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE)["services"]
EXAMPLE = (DEPLOY / ".env.example").read_text(encoding="utf-8")
SERVERS = {"cpu": "foretoken", "gpu": "foretoken-gpu"}
TO_FILL_IN = ("FORETOKEN_API_KEY", "GRAFANA_PASSWORD")


def example() -> dict[str, str]:
    """Variables of .env.example with their values."""
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", EXAMPLE, flags=re.MULTILINE))


def instructions() -> dict[str, list[tuple[str, str]]]:
    """(instruction, rest) of each stage of the Dockerfile, continued lines joined, comments left out; FROM included."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line:
            word, rest = line.split(maxsplit=1)
            if word == "FROM":
                stage = stages.setdefault(rest.split(" AS ")[1], [])
            stage.append((word, rest))
    return stages


STAGES = instructions()


def of_stage(stage: str, word: str) -> list[str]:
    return [rest for name, rest in STAGES[stage] if name == word]


def lines_of(text: str, variable: str) -> list[str]:
    """The values with which compose would fill in `${variable...}`: the part after :- or -, else none."""
    return re.findall(rf"\$\{{{variable}(?::?-([^}}]*))\}}", text)


# --- Dockerfile ------------------------------------------------------------


def test_base_images_are_pinned_and_stages_exist() -> None:
    for stage, ((_, source), *_) in STAGES.items():
        image = source.split(" AS ")[0]
        assert image in STAGES or re.search(r":\d+\.\d+\.\d+-", image), f"{stage}: {image} names no exact version"
    assert {"cpu", "gpu"} <= STAGES.keys()


@pytest.mark.parametrize("target", SERVERS)
def test_the_image_runs_as_a_numeric_user_with_one_writable_folder(target: str) -> None:
    (user,) = of_stage(target, "USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    (folder,) = of_stage(target, "VOLUME")
    environ = dict(word.split("=", 1) for word in of_stage(target, "ENV")[0].split())
    for name in ("HOME", "TMPDIR", "HF_HOME", "NUMBA_CACHE_DIR"):
        assert Path(environ[name]).is_relative_to(folder), name
    assert any(folder in rest and user.split(":")[0] in rest for rest in of_stage(f"{target}-base", "RUN"))
    assert any("g++" in rest for rest in of_stage(f"{target}-base", "RUN")), "attention and passes compile at the start"


def test_both_targets_end_alike() -> None:
    def ending(target: str) -> list[tuple[str, str]]:
        return [(word, rest.replace(f"{target}-build", "build")) for word, rest in STAGES[target][1:]]

    assert ending("cpu") == ending("gpu")
    assert "/ready" in of_stage("cpu", "HEALTHCHECK")[0]


def test_variables_of_the_image_are_settings() -> None:
    names = re.findall(rf"\b{ENV_PREFIX}(\w+)=", of_stage("cpu", "ENV")[0])
    assert names
    assert {name.lower() for name in names} <= set(setting_names())


def test_torch_and_version_are_those_of_the_project() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (torch,) = re.findall(r"^TORCH\s+\?= (\S+)$", makefile, flags=re.MULTILINE)
    version = PROJECT["version"]
    for target, service in SERVERS.items():
        assert f"TORCH={torch}" in of_stage(f"{target}-build", "ARG")
        assert f'image.version="{version}"' in of_stage(target, "LABEL")[0]
        assert SERVICES[service]["image"] == f"foretoken:{version}-{target}"
    assert set(lines_of(COMPOSE, "TORCH")) == {torch} == {example()["TORCH"]}


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves `path` out: the last pattern that matches it, or a folder it is in, decides."""
    out = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            plain = pattern.removeprefix("!").removeprefix("**/")
            parts = Path(path).parts
            heads = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
            names = [*heads, *parts] if "**/" in pattern else heads
            if any(fnmatch(name, plain) for name in names):
                out = not pattern.startswith("!")
    return out


@pytest.mark.parametrize("target", SERVERS)
def test_everything_copied_exists_and_is_sent_to_the_builder(target: str) -> None:
    for copied in of_stage(f"{target}-build", "COPY"):
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source), source
    packages = {pattern.rstrip("*") for pattern in ("server*", "drafters*", "verifier*")}
    assert packages <= {copied.split()[0] for copied in of_stage(f"{target}-build", "COPY")}


def test_nothing_else_is_sent_to_the_builder() -> None:
    assert not ignored("server/demo/model/model.safetensors")
    for path in (".git/config", ".venv/bin/python", "deploy/.env", "tests/conftest.py", "server/__pycache__/cli.pyc"):
        assert ignored(path), path


def health_checks() -> dict[str, list[str]]:
    """The commands of the image and of compose; the variable with the address comes with the image."""
    image = of_stage("cpu", "HEALTHCHECK")[0].split(" CMD ")[1]
    return {
        "image": json.loads(image),
        **{name: SERVICES[name]["healthcheck"]["test"][1:] for name in SERVERS.values()},
    }


@pytest.mark.parametrize("name", ["image", *SERVERS.values()])
def test_the_health_check_asks_where_the_server_listens(name: str, tmp_path: Path) -> None:
    """Whatever port and host a flag named: nothing of them stands in the command."""
    _, *words = health_checks()[name]
    assert "FORETOKEN_ADDRESS_FILE" in of_stage("cpu", "ENV")[0]
    environ = {"FORETOKEN_ADDRESS_FILE": str(tmp_path / "address"), "FORETOKEN_PORT": "1"}
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) == 1 else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with bind("127.0.0.1", 0) as listener, HTTPServer(("127.0.0.1", 0), Answer, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        with told_address(environ["FORETOKEN_ADDRESS_FILE"], listener):
            for is_well in (True, False):
                listener.setblocking(True)
                serving = threading.Thread(target=server.handle_request)
                serving.start()
                done = subprocess.run([sys.executable, *words], env=environ, capture_output=True, timeout=30)
                serving.join()
                assert (done.returncode == 0) == is_well, done.stderr
    assert asked == ["/ready", "/ready"]
    assert subprocess.run([sys.executable, *words], env=environ, capture_output=True).returncode != 0


# --- compose ------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_privilege_and_has_limits(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not service.keys() & {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "user"}
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert any(line.startswith("/tmp:") for line in service["tmpfs"])
    assert re.search(r":v?\d+\.\d+\.\d+(-[a-z]+)?$", service["image"]), "an image is pinned"


@pytest.mark.parametrize("name", SERVICES)
def test_ports_open_on_loopback_alone(name: str) -> None:
    for port in SERVICES[name]["ports"]:
        assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:"), port
    assert example()["BIND_ADDRESS"] == "127.0.0.1"


@pytest.mark.parametrize("name", SERVICES)
def test_every_mount_has_its_source(name: str) -> None:
    volumes = yaml.safe_load(COMPOSE)["volumes"]
    for mount in SERVICES[name]["volumes"]:
        source = re.sub(r"\$\{\w+:-([^}]+)\}", r"\1", mount).split(":")[0]
        if source.startswith("."):
            assert (DEPLOY / source).is_dir(), source
            assert mount.endswith(":ro"), "what comes from the tree is read-only"
        else:
            assert source in volumes


def test_a_server_is_given_its_drain_time_and_what_comes_after() -> None:
    operations = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (more,) = re.findall(r"the drain time and (\d+) seconds", operations)
    for service in SERVERS.values():
        (default,) = lines_of(SERVICES[service]["stop_grace_period"], "STOP_GRACE")
        assert default.endswith("s")
        assert float(default[:-1]) >= Settings().drain_timeout_s + float(more)


def test_profiles_and_start_order() -> None:
    for profile, service in SERVERS.items():
        assert SERVICES[service]["profiles"] == [profile]
        assert SERVICES[service]["build"]["target"] == profile
    assert example()["COMPOSE_PROFILES"] == "cpu"
    assert SERVICES["foretoken-gpu"]["networks"]["default"]["aliases"] == ["foretoken"]
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}


def test_grafana_lets_nobody_in_without_the_password() -> None:
    environ = SERVICES["grafana"]["environment"]
    assert environ["GF_USERS_ALLOW_SIGN_UP"] == environ["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environ["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")
    board = environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].replace("/var/lib/grafana", str(DEPLOY / "grafana"))
    assert Path(board).is_file()


def test_variables_of_the_server_are_settings() -> None:
    for service in SERVERS.values():
        names = [name for name in SERVICES[service]["environment"] if name.startswith(ENV_PREFIX)]
        assert "FORETOKEN_API_KEY" in names
        assert {name.removeprefix(ENV_PREFIX).lower() for name in names} <= set(setting_names())


def test_the_example_names_every_variable_and_no_other() -> None:
    read = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE))
    assert read | {"COMPOSE_PROFILES"} == example().keys()


def test_the_example_holds_the_defaults_and_no_secret() -> None:
    for name, value in example().items():
        if name in TO_FILL_IN:
            assert value == ""
            assert f"${{{name}:?" in COMPOSE
        elif name != "COMPOSE_PROFILES":
            assert set(lines_of(COMPOSE, name)) == {value}, name


# --- by the programs themselves ----------------------------------------


def compose_client() -> list[str] | None:
    """The command of a Compose client of version 2 or newer, or None."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            told = subprocess.run([*words, "version", "--short"], capture_output=True, text=True)
            if told.returncode == 0 and not told.stdout.startswith("1."):
                return words
    return None


CLIENT = compose_client()
HADOLINT = shutil.which(
    "hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
)


def config(tmp_path: Path, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config` with .env.example, `values` filled in."""
    assert CLIENT is not None
    filled = EXAMPLE
    for name, value in values.items():
        filled = re.sub(rf"^{name}=.*$", f"{name}={value}", filled, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(filled)
    environ = {name: value for name, value in os.environ.items() if name not in example()}
    files = ["--env-file", str(tmp_path / ".env"), "--file", str(DEPLOY / "compose.yaml")]
    return subprocess.run([*CLIENT, *files, "config", *words], capture_output=True, text=True, env=environ, timeout=60)


needs_compose = pytest.mark.skipif(CLIENT is None, reason="docker compose (2 or newer) is not installed")


@needs_compose
@pytest.mark.parametrize("profile", SERVERS)
def test_compose_takes_the_example_with_two_lines_filled_in(profile: str, tmp_path: Path) -> None:
    done = config(tmp_path, FORETOKEN_API_KEY="one,two", GRAFANA_PASSWORD="secret", COMPOSE_PROFILES=profile)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services.keys() == {SERVERS[profile], "prometheus", "grafana"}
    for service in services.values():
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
    assert services[SERVERS[profile]]["environment"]["FORETOKEN_API_KEY"] == "one,two"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in services[SERVERS[profile]]["environment"]


@needs_compose
@pytest.mark.parametrize("missing", TO_FILL_IN)
def test_compose_refuses_an_example_that_nobody_filled_in(missing: str, tmp_path: Path) -> None:
    values = {name: "filled" for name in TO_FILL_IN if name != missing}
    done = config(tmp_path, "--quiet", **values)
    assert done.returncode != 0
    assert missing in done.stderr


@needs_compose
def test_without_a_profile_there_are_only_watchers(tmp_path: Path) -> None:
    done = config(tmp_path, FORETOKEN_API_KEY="k", GRAFANA_PASSWORD="p", COMPOSE_PROFILES="")
    assert yaml.safe_load(done.stdout)["services"].keys() == {"prometheus", "grafana"}
    assert "without it starts Prometheus and Grafana" in " ".join((DEPLOY / "README.md").read_text().split())


@needs_compose
def test_other_lines_do_not_reach_the_server_and_that_is_said(tmp_path: Path) -> None:
    done = config(tmp_path, FORETOKEN_API_KEY="k", GRAFANA_PASSWORD="p\nFORETOKEN_MAX_NUM_SEQS=32")
    assert "FORETOKEN_MAX_NUM_SEQS" not in yaml.safe_load(done.stdout)["services"]["foretoken"]["environment"]
    assert "`FORETOKEN_MAX_NUM_SEQS=32` here would do nothing" in EXAMPLE


@needs_compose
def test_compose_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    done = config(tmp_path, FORETOKEN_API_KEY="k", GRAFANA_PASSWORD="p", STOP_GRACE="140s")
    assert yaml.safe_load(done.stdout)["services"]["foretoken"]["stop_grace_period"] == "2m20s"


@needs_compose
@pytest.mark.parametrize("line", ENV_LINES)
def test_compose_takes_a_line_for_what_the_smoke_test_does(line: str, tmp_path: Path) -> None:
    done = config(tmp_path, GRAFANA_PASSWORD=f"p\n{line}")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"]["foretoken"]["environment"]["FORETOKEN_API_KEY"] == ENV_LINES[line]


@needs_compose
def test_the_toolkit_can_be_told_to_take_an_older_driver(tmp_path: Path) -> None:
    words = {"FORETOKEN_API_KEY": "k", "GRAFANA_PASSWORD": "p", "COMPOSE_PROFILES": "gpu"}
    for told in ("0", "1"):
        done = config(tmp_path, **words, NVIDIA_DISABLE_REQUIRE=told)
        environ = yaml.safe_load(done.stdout)["services"]["foretoken-gpu"]["environment"]
        assert environ["NVIDIA_DISABLE_REQUIRE"] == told
        assert environ["FORETOKEN_API_KEY"] == "k"


@needs_compose
def test_compose_passes_flags_on_as_words(tmp_path: Path) -> None:
    words = "--max-num-seqs 32 --served-model-name 'my model'"
    done = config(tmp_path, FORETOKEN_API_KEY="k", GRAFANA_PASSWORD="p", FORETOKEN_ARGS=f'"{words}"')
    command = yaml.safe_load(done.stdout)["services"]["foretoken"]["command"]
    assert command == ["serve", "--max-num-seqs", "32", "--served-model-name", "my model"]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
