"""Who may import whom, as a table: docs/architecture.md in a form that cannot go stale."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "drafters", "training", "verifier")

_SHARED = tuple(
    f"verifier.{name}"
    for name in (
        "accept", "attention", "backend", "fingerprint", "ipc", "jit", "kv", "masks", "memory", "model", "noise",
        "options", "parent", "plan", "private_folder", "probe", "quantization", "rows", "scores", "seam", "step",
        "tree", "verdict", "weights",
    )
)  # fmt: skip
"""What all back ends are made of."""

ROOMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # The first row whose prefix fits a module names every project module that it may import.
    ("verifier.masks", ()),
    ("verifier.plan", ("verifier.masks",)),
    ("verifier.tree", ("verifier.plan",)),
    ("verifier.private_folder", ()),
    ("verifier.ipc", ()),
    ("verifier.jit", ("verifier.private_folder",)),
    ("verifier.cpu.products", ("verifier.cpu.build", "verifier.cpu.threads")),
    ("verifier.cpu.fused", ("verifier.cpu.build", "verifier.cpu.products", "verifier.cpu.threads")),
    # One folder for each back end, over what they share; `load` alone knows all of them.
    ("verifier.torch", (*_SHARED, "verifier.torch")),
    ("verifier.cpu", (*_SHARED, "verifier.torch", "verifier.cpu")),
    ("verifier.cuda", (*_SHARED, "verifier.torch", "verifier.cuda")),
    ("verifier.parallel.main", ("verifier",)),
    ("verifier.parallel", (*_SHARED, "verifier.torch", "verifier.parallel")),
    ("verifier.load", ("verifier",)),
    ("verifier", _SHARED),
    # Behind the tree: how code is compiled, and how matrices are multiplied. These know of no model and no step.
    (
        "drafters",
        (
            "drafters",
            "verifier.tree",
            "verifier.plan",
            "verifier.jit",
            "verifier.cpu.noise",
            "verifier.cpu.products",
            "verifier.cpu.fused",
        ),
    ),
    (
        "server.worker",
        (
            "server.worker",
            "server.messages",
            "server.caution",
            "server.config",
            "server.errors",
            "server.grammar",
            "server.model_files",
            "server.default_model",
            "server.tokenizer",
            "drafters",
            "verifier",
        ),
    ),
    ("server.errors", ()),
    ("server.config", ("server.errors",)),
    ("server.caution", ("server.config",)),
    ("server.messages", ("verifier.plan", "verifier.ipc")),
    ("server.gguf_child", ("server.gguf", "server.gguf_header", "verifier")),
    (
        "server.commands.check_model",
        ("server.config", "server.errors", "server.gguf", "server.model_files", "verifier"),
    ),
    ("training", ("training", "drafters", "verifier", "server")),
    ("server", ("server", "drafters.base", "verifier.ipc", "verifier.plan", "verifier.private_folder")),
)
"""The API side is everything under server but the worker and the commands that look into models."""

WITH_MODEL = (
    "server.worker",
    "server.tokenizer_child",
    "server.gguf_child",
    "server.commands.check_model",
    "training",
)
"""Never imported by name on the API side: three are processes of their own, the commands are loaded when they run."""

OWNERS = {
    "prometheus_client": ("server.metrics", "server.metric_aliases", "server.metric_families", "server.metric_steps"),
    "transformers": (
        "verifier.seam",
        "verifier.quantization",
        "verifier.parallel.split",
        "server.tokenizer_child",
        "server.gguf_child",
    ),
    "gguf": ("server.gguf_child",),
    "torch": (
        "verifier",
        "server.worker",
        "server.commands.check_model",
        "server.gguf_child",
        "training",
        "drafters.head",
    ),
    "safetensors": ("verifier", "drafters.head.files", "training.answer_store"),
    "numba": ("verifier", "drafters", "training"),
    "uvicorn": ("server.commands.serve",),
    "fastapi": ("server.app", "server.api", "server.commands.serve"),
    "starlette": ("server.app", "server.api"),
    "sse_starlette": ("server.api",),
    "pydantic": ("server.app", "server.api"),
    "jinja2": ("server.chat_template",),
    "yaml": ("server.config",),
    "httpx": ("server.commands.first_model", "server.commands.chat"),
    "huggingface_hub": ("server.model_files", "verifier.model", "verifier.fingerprint"),
    "llguidance": ("server.grammar_check", "server.worker"),
    "pickle": (),
    "marshal": (),
    "shelve": (),
}
"""Third parties and the only modules that may name them."""


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, also inside functions; `from a import b` gives a.b if that exists."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield dotted if dotted in MODULES else node.module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    allowed = next(names for prefix, names in ROOMS if is_within(module, prefix))
    for name in imports_of(MODULES[module]):
        if name.split(".")[0] in PACKAGES:
            assert any(is_within(name, prefix) for prefix in allowed), f"{module} imports {name}"
            if not any(is_within(module, prefix) for prefix in WITH_MODEL):
                assert not any(is_within(name, prefix) for prefix in WITH_MODEL), f"{module} imports {name}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_third_parties_have_owners(module: str) -> None:
    for name in imports_of(MODULES[module]):
        owners = OWNERS.get(name.split(".")[0])
        if owners is not None:
            # server.commands.bench owns server.commands.bench_http too: a prefix of a name is enough here.
            assert any(module.startswith(owner) for owner in owners), f"{module} imports {name}"


def test_the_table_names_modules_that_exist() -> None:
    named = {prefix for prefix, _ in ROOMS} | {name for _, names in ROOMS for name in names} | set(WITH_MODEL)
    assert named <= set(MODULES)
    owners = {owner for names in OWNERS.values() for owner in names}
    assert owners <= set(MODULES)


def test_the_api_side_runs_without_torch_and_transformers() -> None:
    code = (
        "import sys\n"
        "import server.app, server.engine, server.prompt, server.metrics, server.cli\n"
        "import server.commands.serve, server.commands.bench\n"
        "heavy = {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "worker = sorted(name for name in sys.modules if name.startswith('server.worker.'))\n"
        "assert not worker, worker\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
