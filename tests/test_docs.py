"""Documents that can go stale: links, settings, error codes, commands."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import BaseModel

import server.api.failures  # for the error that lives there
from drafters import MASKS, PLAIN
from drafters.base import Drafter
from server.api import schema
from server.api.fields import (
    ASK_WHEN_EMPTY,
    NEUTRAL,
    REASONING_PARTS,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_IN_ANSWER,
    WITHOUT_EFFECT_IN_MESSAGE,
)
from server.api.messages.schema import MessageRequest
from server.api.parse import parse
from server.api.prompt_cut import MAX_CUT_TOKENS
from server.api.responses.schema import ResponseRequest
from server.api.schema import ChatRequest, CompletionRequest
from server.api.writer import PADDED_BYTES
from server.cli import COMMANDS
from server.config import Settings, to_markdown
from server.errors import ServingError, UnsupportedParameter
from tests.doc_blocks import DOCUMENTS

HABITS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


ALERTS = (
    "server-down",
    "worker-restarting",
    "queue-growing",
    "slow-first-token",
    "speculation-costs",
    "acceptance-collapsed",
    "kv-pages-exhausted",
    "errors",
)


def error_classes(base: type[ServingError] = ServingError) -> list[type[ServingError]]:
    return [base, *(found for child in base.__subclasses__() for found in error_classes(child))]


def anchors(document: Path) -> set[str]:
    """What a link into `document` may end in: its headings, as the usual renderers name them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found = document.parent / path if path else document
            assert found.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{document.name}: {target}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{path.name}" in text for path in (ROOT / "docs").glob("*.md"))


def test_the_configuration_page_is_made_from_the_settings() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == to_markdown(), "run: python -m server.config > docs/configuration.md"
    assert all(f"`--{entry.name.replace('_', '-')}`" in page for entry in fields(Settings))


def test_every_drafter_and_every_hook_of_one_is_told() -> None:
    page = (ROOT / "docs/drafters.md").read_text(encoding="utf-8")
    assert [name for name in (PLAIN, *MASKS) if f"| `{name}`" not in page] == []
    told = set(re.findall(r"`(\w+)(?:\([\w, ]*\))?`", page))
    hooks = {name for name in (*vars(Drafter), *Drafter.__annotations__) if not name.startswith("_")}
    assert len(hooks) >= 9
    assert hooks - told == set()


def test_the_runbook_has_a_section_for_each_alert() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### ([\w-]+)\n\n(.*?)(?=\n### |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert tuple(sections) == ALERTS
    assert all(f"**{part}**" in text for text in sections.values() for part in ("Means", "Look at", "Do"))


def test_every_error_code_is_told_with_its_status() -> None:
    assert server.api.failures.InternalError in error_classes()
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| (\d{3}) \| `(\w+)`", page, flags=re.MULTILINE))
    # 499 is for our own log: nobody is there to read it.
    real = {(str(found.status), found.code) for found in error_classes() if found.status != 499}
    assert told == real


@pytest.mark.parametrize("model", [ResponseRequest, MessageRequest])
def test_every_request_field_of_the_other_apis_is_told(model: type[BaseModel]) -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert [name for name in model.model_fields if f"`{name}`" not in page] == []


def field_rows() -> dict[str, str]:
    """The table of every field: what is said of it here."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| field \| here \|.*?\n\|[-|]+\n(.*?)\n\n", page, flags=re.MULTILINE | re.DOTALL)
    rows = [re.fullmatch(r"\| `(\w+)` \| (.+?) \|(?: [^|]*\|){3}", line) for line in table.split("\n")]
    assert all(rows)
    found = {row.group(1): row.group(2) for row in rows if row is not None}
    assert len(found) == len(rows), "a field stands there twice"
    return found


def test_the_table_of_every_field_is_true() -> None:
    chat, text = ChatRequest.model_fields.keys(), CompletionRequest.model_fields.keys()
    without_effect = WITHOUT_EFFECT | HABITS
    rows = field_rows()
    assert rows.keys() == chat | text | NEUTRAL.keys() | without_effect
    for name, here in rows.items():
        if name in without_effect:
            expected = "none"
        elif name not in chat | text:
            expected = "refused"
        else:
            expected = "yes" if name in chat & text else "chat" if name in chat else "completions"
        assert re.match(r"\w+", here).group() == expected, name  # type: ignore[union-attr]
        if expected == "refused":
            assert set(re.findall(r"`([^`]+)`", here)) == {json.dumps(value) for value in NEUTRAL[name]}, name


def test_the_table_tells_the_limits() -> None:
    rows = field_rows()
    for name, limit in {
        "messages": schema.MAX_MESSAGES,
        "logit_bias": schema.MAX_LOGIT_BIAS,
        "stop_token_ids": schema.MAX_STOP_IDS,
        "allowed_token_ids": schema.MAX_ALLOWED_TOKEN_IDS,
        "bad_words": schema.MAX_BAD_WORDS,
        "cache_salt": schema.MAX_SALT_CHARS,
        "n": schema.MAX_N,
        "prompt": schema.MAX_PROMPTS,
        "prompt_logprobs": schema.MAX_LOGPROBS,
        "truncate_prompt_tokens": MAX_CUT_TOKENS,
        "stream_options": PADDED_BYTES,
    }.items():
        assert re.search(rf"\b({limit}|{limit:,})\b", rows[name]), name


def test_every_field_without_effect_is_told() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(
            r"^\| (the request|a message|a text part|a turn of the assistant[^|]*) \| (.*) \|$",
            page,
            flags=re.MULTILINE,
        )
    )
    told = {where: set(re.findall(r"`(\w+)`", text)) for where, text in rows.items()}
    assert told["the request"] == WITHOUT_EFFECT | HABITS
    assert told["a message"] == WITHOUT_EFFECT_IN_MESSAGE | {"name"}
    assert told["a text part"] == WITHOUT_EFFECT_IN_MESSAGE
    assert told["a turn of the assistant, and its text parts"] == WITHOUT_EFFECT_IN_ANSWER - WITHOUT_EFFECT_IN_MESSAGE
    assert told["a turn of the assistant"] == {*REASONING_PARTS}
    full = re.search(r"emptiness says something: `{}` and `\[\]` are refused in\n(.*?)\. Fields", page, flags=re.DOTALL)
    assert full is not None
    assert set(re.findall(r"`(\w+)`", full.group(1))) == ASK_WHEN_EMPTY


@pytest.mark.parametrize("name", ["functions", "function_call", "best_of", "suffix"])
def test_fields_said_to_be_refused_are(name: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], name: ["something"]}
    with pytest.raises(UnsupportedParameter, match=name):
        parse(ChatRequest, body)


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"foretoken {name}" in text for name in COMMANDS)
