"""One frozen Settings: the only reader of argv, environment and config file.

The command line, the environment (FORETOKEN_<FIELD>), the YAML file and docs/configuration.md are all made from the
fields below; each carries its help text and bounds.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from server.errors import StartupError

_TUPLE = "tuple[str, ...]"
_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    _TUPLE: "one or several texts",
}


def setting(default: Any, help_text: str, **bounds: Any) -> Any:
    """A field of Settings with its sentence; bounds are `ge`, `le`, `choices`; `is_path` expands `~`."""
    return field(default=default, metadata={"help": help_text, **bounds})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a server can be told. Names are vLLM's where the meaning is the same."""

    model: str = setting(
        "",
        "Folder or Hub id of a Hugging Face causal language model, or a GGUF file; empty serves SmolLM2-135M-Instruct "
        "where its weights are installed, else the demo model that comes with Foretoken, each with its drafter files.",
        is_path=True,
    )
    revision: str = setting("", "Branch, tag or commit of a Hub model; empty is its default branch.")
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 lets the system choose.", ge=0, le=65535)
    address_file: str = setting(
        "",
        "File that holds `http://HOST:PORT` while the server listens there, for health checks; empty writes none. The "
        "image sets it.",
        is_path=True,
    )
    served_model_name: tuple[str, ...] = setting(
        (),
        "Names under which clients ask for the model; default: the folder's or file's name or the Hub id, without a "
        "model SmolLM2-135M-Instruct or foretoken-demo.",
    )
    api_key: tuple[str, ...] = setting(
        (), "Accepted API keys; none means no authentication. Each key is a tenant of its own."
    )
    dtype: str = setting(
        "auto",
        "Weights and K/V type; auto takes bfloat16 on a GPU, and on a CPU that multiplies it for weights stored so, "
        "else float32; for quantised weights the type that the checkpoint names for the others. On a CPU no text "
        "depends on speculation, but for 16 bits and mixtures of experts, --no-compile, or no g++: then, and on a GPU, "
        "it may at near-ties.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting(
        "auto", "Where the model runs; auto takes a GPU when there is one.", choices=("auto", "cpu", "cuda")
    )
    attention: str = setting(
        "auto",
        "Attention back end, and with it how K/V are moved and tokens are chosen; auto takes triton (own kernels) on a "
        "GPU where it is installed, native (own code, compiled at the first start) on a CPU where there is g++ 12 or "
        "newer, else sdpa (PyTorch's).",
        choices=("auto", "native", "sdpa", "triton"),
    )
    eager: bool = setting(
        False,
        "Run every forward pass as transformers wrote it: as with --no-compile, and on a GPU with attention triton "
        "without CUDA graphs.",
    )
    compile: bool = setting(
        True,
        "Quicker code in the place of transformers' modules, where it gives the same numbers: on a CPU C++ of ours, "
        "which needs g++; on a GPU compiled layers, which take half a minute at the first start of a model.",
    )
    wait_for_compile: bool = setting(
        False,
        "Be ready only when all is compiled and measured. Without it a server on a CPU answers as soon as its model is "
        "read, plainly at first; no text depends on it. On a GPU it always waits.",
    )
    reserve_worker: bool = setting(
        True,
        "Keep a second worker process that has imported everything and loaded nothing (about 400 MB): it takes over "
        "from a worker that dies, some seconds sooner than a new one.",
    )
    threads: int = setting(
        0,
        "Compute threads of the worker on a CPU, all ranks together; 0 takes one for each core that it may use, and of "
        "four or more leaves one to the API process, unless cores have second threads.",
        ge=0,
        le=1024,
    )
    tensor_parallel_size: int = setting(
        1,
        "Ranks that split the model, by transformers' plan for its family: as many GPUs of this machine, or processes "
        "that share the threads of a CPU. Attention and K/V heads must divide by it. From 2 on forward passes run as "
        "with eager, and nothing is compiled.",
        ge=1,
        le=64,
    )
    max_model_len: int = setting(
        0, "Longest prompt plus answer in tokens; 0 takes the model's own limit.", ge=0, le=16_777_216
    )
    max_num_seqs: int = setting(64, "Most requests that run at once.", ge=1, le=1024)
    max_num_batched_tokens: int = setting(
        2048, "Most packed positions of one step (prompt chunks and tree nodes).", ge=64, le=1_048_576
    )
    page_size: int = setting(16, "Tokens per K/V page.", ge=1, le=256)
    num_pages: int = setting(0, "K/V pages; 0 sizes the pool from memory.", ge=0, le=16_777_216)
    kv_cache_gib: float = setting(
        0.0,
        "Memory for K/V pages in GiB, all ranks together; 0 chooses: 80 % of what is free on each GPU, at most 4 GiB "
        "on a CPU.",
        ge=0,
    )
    enable_prefix_caching: bool = setting(
        True, "Keep finished pages and reuse them for equal prompt prefixes of the same tenant."
    )
    seed: int = setting(
        0, "Server seed: requests without a seed draw theirs from it when it is not 0.", ge=0, le=2**63 - 1
    )
    tool_call_parser: str = setting(
        "auto",
        "How the model writes calls of tools; auto sees it in the model's chat template.",
        choices=("auto", "hermes", "llama3", "mistral", "deepseek"),
    )
    drafter: str = setting(
        "hybrid", "Default drafter of requests that do not name one: hybrid merges what the others know."
    )
    ctc_head: str = setting(
        "", "Folder of a CTC head made by `foretoken train-ctc` for this model; empty drafts without one.", is_path=True
    )
    trigram_table: str = setting(
        "", "Corpus table made by `foretoken build-trigram`; empty means on-line learning only.", is_path=True
    )
    trigram_state: str = setting(
        "",
        "File in which the tri-gram drafter keeps what it learned on line across restarts; empty keeps nothing.",
        is_path=True,
    )
    max_nodes: int = setting(16, "Most nodes of one draft tree, root included; 1 is plain decoding.", ge=1, le=64)
    max_queued: int = setting(256, "Most requests that wait; more are answered 429 with Retry-After.", ge=0, le=100_000)
    max_body_bytes: int = setting(8 * 2**20, "Largest request body.", ge=1024, le=2**30)
    prompt_timeout_s: float = setting(
        10.0,
        "How long rendering and encoding one prompt may take, and as long again for each 1,048,576 characters of it; "
        "then its process is ended and the request is answered 400.",
        ge=0.1,
        le=3600,
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        "Origins whose pages may call this server from a browser (CORS), as `https://app.example.org`, or `*` for all; "
        "without any, no page of another origin gets in.",
    )
    max_stored_responses: int = setting(
        1024, "Most responses of /v1/responses kept in memory for clients that come back to them; 0 keeps none.", ge=0
    )
    max_stored_bytes: int = setting(256 * 2**20, "Memory of all stored responses.", ge=2**20)
    grammar_timeout_s: float = setting(
        0.5,
        "How long compiling the schema, regex or grammar of one request may take; then its process is ended and the "
        "request is answered 400.",
        ge=0.05,
        le=60,
    )
    max_stop_strings: int = setting(4, "Most stop strings of one request.", ge=1, le=16)
    max_logprobs: int = setting(20, "Most alternatives per token a request may ask for.", ge=0, le=20)
    keep_alive_s: float = setting(15.0, "Seconds between comment pings on a silent stream.", ge=0.1, le=3600)
    idle_connection_s: int = setting(
        75,
        "Seconds for which an open HTTP connection may wait for its next request; proxies and clients must give up "
        "sooner (most do after 60), or they send one to a connection that is being closed.",
        ge=1,
        le=3600,
    )
    worker_timeout_s: float = setting(
        60.0,
        "A worker that says nothing for so long, between steps or in one, has hung: it is killed and replaced, and its "
        "answers go on. A step that its long prompts make slow has more, by what was measured.",
        ge=15,
        le=86400,
    )
    load_timeout_s: float = setting(
        3600.0,
        "A worker that has not loaded for so long, downloads and compiling included, has hung as well.",
        ge=1,
        le=604800,
    )
    drain_timeout_s: float = setting(30.0, "How long a SIGTERM waits for running answers.", ge=0, le=3600)
    metrics_vllm_aliases: bool = setting(
        True,
        "Export the metrics also under the names of vLLM that its bench, dashboards and routers read (`vllm:...`).",
    )
    log_level: str = setting("info", "Log level.", choices=("debug", "info", "warning", "error"))


class SettingsError(StartupError):
    """Something the user passed cannot be right; the message names it and its limit."""


ENV_PREFIX = "FORETOKEN_"

_ORIGIN = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/?#\s]+")
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


def setting_names() -> tuple[str, ...]:
    """Every field of Settings, in the order of the class."""
    return tuple(entry.name for entry in fields(Settings))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of Settings, and `--config`; values stay text until `load` judges them."""
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of settings.")
    for entry in fields(Settings):
        flag = "--" + entry.name.replace("_", "-")
        text = f"{entry.metadata['help']} [{_default_text(entry)}]".replace("%", "%%")
        if entry.type == "bool":
            parser.add_argument(
                flag, dest=entry.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        elif entry.type == _TUPLE:
            parser.add_argument(flag, dest=entry.name, nargs="+", metavar="TEXT", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, dest=entry.name, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def load(
    argv: Mapping[str, Any], environ: Mapping[str, str], without_model: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from flags (as `add_flags` parsed them), then environment, then YAML file, then defaults.

    Args: `without_model` holds values that count when no source names a model, each unless a source set it; a named
        model never gets any of them.
    Raises SettingsError with one line that names the setting, where it came from, and the limit.
    """
    values: dict[str, Any] = {}
    path = argv.get("config") or environ.get(ENV_PREFIX + "CONFIG")
    if path:
        values.update(_from_file(path))
    values.update(_from_environment(environ))
    for entry in fields(Settings):
        if entry.name in argv:
            values[entry.name] = _judge(entry, argv[entry.name], "--" + entry.name.replace("_", "-"), is_text=True)
    for entry in fields(Settings):
        if entry.metadata.get("is_path") and entry.name in values:
            values[entry.name] = _at_home(values[entry.name])
    if without_model and not values.get("model"):
        told = {name: value for name, value in values.items() if name != "model" and value != ()}
        values = {**without_model, **told}
    settings = Settings(**values)
    _check_together(settings)
    return settings


def _at_home(path: str) -> str:
    """`path` with a leading `~` spelled out: a shell does that for a word of its own, not in a file or a variable."""
    return os.path.expanduser(path) if path.startswith("~") else path


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known name, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _from_file(path: str) -> dict[str, Any]:
    import yaml  # here: only a start with --config pays for it

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"--config {path}: expected a mapping of settings, found a {type(document).__name__}")
    by_name = {entry.name: entry for entry in fields(Settings)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name not in by_name:
            raise SettingsError(f"{path}: {key}: {_unknown(name, by_name)}")
        values[name] = _judge(by_name[name], value, f"{path}: {key}", is_text=False)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    by_name = {entry.name: entry for entry in fields(Settings)}
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        name = variable[len(ENV_PREFIX) :].lower()
        if name in by_name:
            entry = by_name[name]
            value: Any = [part.strip() for part in text.split(",") if part.strip()] if entry.type == _TUPLE else text
            if name == "api_key" and not value:
                raise SettingsError(f"{variable}: set, but there is no key in it: leave it unset to serve without keys")
            values[name] = _judge(entry, value, variable, is_text=True)
        elif difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
            # Other variables with this prefix are not ours to judge: Kubernetes invents some for a service's name.
            raise SettingsError(f"{variable}: {_unknown(name, by_name)}")
    return values


def overruled_port(settings: Settings, environ: Mapping[str, str]) -> str:
    """The port that the environment names, if a flag named another one; else empty."""
    told = environ.get(ENV_PREFIX + "PORT", "")
    return told if told and int(told) != settings.port else ""


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"no such setting{did_you_mean(name, known)}"


def unknown_flag(flag: str) -> SettingsError:
    """The error for a flag of `serve` that does not exist."""
    name = flag.lstrip("-").split("=", 1)[0].replace("-", "_")
    return SettingsError(f"{flag}: {_unknown(name, setting_names()).replace('_', '-')}")


def _judge(entry: Field[Any], value: Any, origin: str, *, is_text: bool) -> Any:
    """The value of one field in its own type and within its bounds; `is_text` allows "8" for 8."""
    kind = str(entry.type)
    if kind == _TUPLE:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item for item in items):
            raise SettingsError(f"{origin}: expected one or several texts, got {value!r}")
        if any(item != item.strip() for item in items):
            raise SettingsError(f"{origin}: a text has blanks around it, which no client can send")
        if origin == "--api-key" and (folder := next(filter(os.path.isdir, items), None)) is not None:
            raise SettingsError(
                f"--api-key: {folder} is a folder, not a key: every word after --api-key is taken for one, "
                f"write the model first (`foretoken serve {folder} --api-key KEY`)"
            )
        return tuple(items)
    if is_text and isinstance(value, str):
        value = _parse(kind, value, origin)
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind:
        raise SettingsError(f"{origin}: expected {_KINDS[kind]}, got {value!r}")
    return _bound(entry, value, origin)


def _parse(kind: str, text: str, origin: str) -> Any:
    if kind == "bool":
        if text.lower() not in _TRUE | _FALSE:
            raise SettingsError(f"{origin}: expected true or false, got {text!r}")
        return text.lower() in _TRUE
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError as error:
        hint = ""
        if text.startswith("tcp://"):
            hint = " (Kubernetes sets this for a service of the same name; enableServiceLinks: false stops it)"
        raise SettingsError(f"{origin}: expected {_KINDS[kind]}, got {text!r}{hint}") from error


def _bound(entry: Field[Any], value: Any, origin: str) -> Any:
    meta = entry.metadata
    if "choices" in meta and value not in meta["choices"]:
        near = did_you_mean(str(value), meta["choices"])
        raise SettingsError(f"{origin}: must be one of {', '.join(meta['choices'])}, got {value!r}{near}")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{origin}: must be a finite number, got {value}")
    if "ge" in meta and value < meta["ge"]:
        raise SettingsError(f"{origin}: must be at least {meta['ge']}, got {value}")
    if "le" in meta and value > meta["le"]:
        raise SettingsError(f"{origin}: must be at most {meta['le']}, got {value}")
    return value


def _check_origins(origins: tuple[str, ...]) -> None:
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"--allowed-origins: {origin!r} is no origin: write scheme and host, and a port where it is not the "
                "scheme's own, as browsers send it (https://app.example.org, http://localhost:3000), or * for all"
            )


def _check_together(settings: Settings) -> None:
    """Limits that tie two settings to each other, and texts of one form."""
    _check_origins(settings.allowed_origins)
    if settings.max_num_batched_tokens < settings.max_num_seqs:
        raise SettingsError(
            f"--max-num-batched-tokens: must be at least --max-num-seqs ({settings.max_num_seqs}), "
            f"got {settings.max_num_batched_tokens}: every running request takes one position of a step"
        )
    if settings.num_pages and settings.kv_cache_gib:
        raise SettingsError("--num-pages and --kv-cache-gib both size the K/V pool: pass one of them")


def _default_text(entry: Field[Any]) -> str:
    default = entry.default
    if isinstance(default, tuple):
        return " ".join(default) or "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return "empty" if default == "" else str(default)


def _limits_text(entry: Field[Any]) -> str:
    meta = entry.metadata
    if "choices" in meta:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    if "ge" in meta and "le" in meta:
        return f"{entry.type}, {meta['ge']} to {meta['le']}"
    if "ge" in meta:
        return f"{entry.type}, at least {meta['ge']}"
    return _KINDS[str(entry.type)]


def to_markdown() -> str:
    """docs/configuration.md, made from the fields."""
    lines = [
        "# Configuration",
        "",
        "Made by `python -m server.config > docs/configuration.md`; a test keeps it true.",
        "",
        "Every setting is a flag of `foretoken serve`, an environment variable, and a key of the YAML file given",
        "with `--config FILE` (or `FORETOKEN_CONFIG`). A flag wins over the environment, the environment over the",
        "file, the file over the default. Several values are written `--api-key a b`, `FORETOKEN_API_KEY=a,b` or",
        "`api_key: [a, b]`. A wrong value or an unknown key ends the start with one line and exit code 2. Keys",
        "passed as flags can be read in the machine's process list: on a shared machine use the environment or",
        "the file.",
        "",
        "| flag | environment | value | default | meaning |",
        "|---|---|---|---|---|",
    ]
    for entry in fields(Settings):
        dashed = entry.name.replace("_", "-")
        flag = f"`--{dashed}`, `--no-{dashed}`" if entry.type == "bool" else f"`--{dashed}`"
        lines.append(
            f"| {flag} | `{ENV_PREFIX}{entry.name.upper()}` | {_limits_text(entry)} | {_default_text(entry)} | "
            f"{entry.metadata['help']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
