"""Documents that can go stale: links, settings, error codes, commands."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import server.api.failures  # for the error that lives there
from server.api.parse import parse
from server.api.schema import ChatRequest, CompletionRequest
from server.cli import COMMANDS
from server.config import Settings, to_markdown
from server.errors import ServingError, UnsupportedParameter

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def error_classes(base: type[ServingError] = ServingError) -> list[type[ServingError]]:
    return [base, *(found for child in base.__subclasses__() for found in error_classes(child))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name}: {target}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{path.name}" in text for path in (ROOT / "docs").glob("*.md"))


def test_the_configuration_page_is_made_from_the_settings() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == to_markdown(), "run: python -m server.config > docs/configuration.md"
    assert all(f"`--{entry.name.replace('_', '-')}`" in page for entry in fields(Settings))


def test_every_error_code_is_told_with_its_status() -> None:
    assert server.api.failures.InternalError in error_classes()
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| (\d{3}) \| `(\w+)`", page, flags=re.MULTILINE))
    # 499 is for our own log: nobody is there to read it.
    real = {(str(found.status), found.code) for found in error_classes() if found.status != 499}
    assert told == real


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_request_field_is_told(model: type[ChatRequest] | type[CompletionRequest]) -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert [name for name in model.model_fields if f"`{name}`" not in page] == []


@pytest.mark.parametrize("name", ["tools", "tool_choice", "functions", "best_of", "suffix"])
def test_fields_said_to_be_refused_are(name: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], name: ["something"]}
    with pytest.raises(UnsupportedParameter, match=name):
        parse(ChatRequest, body)


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"foretoken {name}" in text for name in COMMANDS)
