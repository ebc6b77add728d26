"""Every field that changes an answer, with speculation off and on, streamed and whole: the same answer each time."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel

from server import demo
from server.api.schema import ChatRequest, CompletionRequest
from tests.api.matrix_cases import BOTH, CHAT, COMPLETIONS, NO_CASE, SAME, TEMPLATE, TEXT, Fields
from tests.api.process import DEMO, serving

ARMS: dict[str, Fields] = {
    "off": {"enabled": False},
    "trigram": {"drafter": "trigram"},
    "hybrid": {"drafter": "hybrid"},
}
SAMPLINGS: dict[str, Fields] = {"greedy": {"temperature": 0, "seed": 5}, "seeded": {"temperature": 0.9, "seed": 5}}
BASES: dict[str, Fields] = {
    "chat/completions": {
        "messages": [{"role": "user", "content": TEXT}],
        **{"logprobs": True, "top_logprobs": 2, "max_tokens": 24},
    },
    "completions": {
        "prompt": f"<|user|>\n{TEXT}<|end|>\n<|assistant|>\n",
        **{"logprobs": 2, "max_tokens": 24},
    },
}
CASES = [
    *(("chat/completions", name, fields) for name, fields in {**BOTH, **CHAT}.items()),
    *(("completions", name, fields) for name, fields in {**BOTH, **COMPLETIONS}.items()),
]
NEAR = 1e-4
"""How far two log-probabilities may lie apart."""


@dataclass
class Table:
    """The server, and the drafted tokens that each arm won so far."""

    url: str
    won: Counter[str] = field(default_factory=Counter)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(demo.MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    words = [str(folder) if word == str(demo.MODEL) else word for word in DEMO]
    with serving(*words) as url:
        yield Table(url)


@pytest.mark.parametrize(("route", "name", "fields"), CASES, ids=[f"{route}: {name}" for route, name, _ in CASES])
def test_one_answer_whatever_drafts_and_however_it_is_sent(table: Table, route: str, name: str, fields: Fields) -> None:
    changes = [asyncio.run(try_case(table, route, sampling, fields)) for sampling in SAMPLINGS]
    assert not any(changes) if name in SAME else any(changes), "whether the field changes the answer"


def test_drafted_tokens_were_won(table: Table) -> None:
    """Else the columns would be the same for want of speculation."""
    assert table.won["off"] == 0
    assert min(table.won["trigram"], table.won["hybrid"]) > len(CASES), table.won


@pytest.mark.parametrize(("route", "model"), [("chat/completions", ChatRequest), ("completions", CompletionRequest)])
def test_every_field_has_a_case(route: str, model: type[BaseModel]) -> None:
    bodies = [fields for one, _, fields in CASES if one == route]
    covered = set().union(*(said(body) for body in (*bodies, {"model": "m"}, BASES[route])))
    assert set(told(model)) - covered - NO_CASE == set(), "give each a case, or say in NO_CASE why it needs none"


async def try_case(table: Table, route: str, sampling: str, fields: Fields) -> str | None:
    """What the first field changes; fails where two of the answers with it differ, of any arm and form."""
    body = {"model": demo.NAME, **BASES[route], **SAMPLINGS[sampling]}
    without = {**body, **dict(list(fields.items())[1:])}
    body |= fields
    forms = (False,) if "prompt_logprobs" in body else (False, True)
    cells = [(arm, is_stream) for arm in ARMS for is_stream in forms]
    async with httpx.AsyncClient(base_url=table.url, timeout=60) as client:
        asked = [ask(client, route, body, *cell) for cell in cells]
        *answers, other = await asyncio.gather(*asked, ask(client, route, without, "off", False))
    first = plain(answers[0])
    for (arm, is_stream), answer in zip(cells, answers, strict=True):
        table.won[arm] += answer.get("metrics", {}).get("speculative_decoding", {}).get("num_accepted_draft_tokens", 0)
        apart = difference(first, plain(answer))
        assert apart is None, f"{route} {sampling}, {arm} {'in a stream' if is_stream else 'whole'}: {apart}"
    return difference(plain(other), first)


async def ask(client: httpx.AsyncClient, route: str, body: Fields, arm: str, is_stream: bool) -> Fields:
    """One answer in the form of a whole one."""
    is_single = body.get("n", 1) == 1 and not isinstance(body.get("prompt"), list)
    speculative = {**body.get("speculative", {}), **ARMS[arm], "metrics": is_single}
    body = {"stream_options": {"include_usage": True}, **body, "speculative": speculative, "stream": is_stream}
    if not is_stream:
        del body["stream_options"]
    response = await client.post(route, json=body)
    assert response.status_code == 200, response.text
    if not is_stream:
        answer: Fields = response.json()
        return answer
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return folded([json.loads(event) for event in events])


def folded(chunks: list[Fields]) -> Fields:
    """The chunks of a stream as one answer."""
    whole: Fields = {}
    choices: dict[int, Fields] = {}
    for chunk in chunks:
        for choice in chunk.pop("choices"):
            choice["message"] = choice.pop("delta", None)
            merge(choices.setdefault(choice["index"], {}), choice)
        whole.update({key: value for key, value in chunk.items() if value is not None})
    return {**whole, "choices": [choices[index] for index in sorted(choices)]}


def merge(into: Fields, piece: Fields) -> None:
    """Add a piece: texts and lists grow, calls by their index, the rest is told once."""
    for key, value in piece.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif key == "tool_calls":
            calls = into.setdefault(key, [])
            for one in value:
                calls.extend({} for _ in range(one["index"] + 1 - len(calls)))
                merge(calls[one.pop("index")], one)
        elif isinstance(value, list) or key in ("text", "content", "reasoning_content", "arguments"):
            into[key] = into[key] + value if key in into else value
        elif value is not None:
            into[key] = value


CHANCE = frozenset({"id", "created", "object", "metrics", "obfuscation"})
"""Another one each time, or for each form."""
BY_DRAFTER = frozenset({"prompt_tokens_details", "completion_tokens_details"})
"""What the prefix cache answered, and what became of a prediction."""


def plain(value: Any) -> Any:
    """`value` without what differs by rights; what is empty counts as absent."""
    if isinstance(value, dict):
        found = {key: plain(one) for key, one in value.items() if key not in CHANCE | BY_DRAFTER}
        return {key: one for key, one in found.items() if one not in (None, "", [], {})}
    return [plain(one) for one in value] if isinstance(value, list) else value


def difference(left: Any, right: Any, path: str = "answer") -> str | None:
    """Where two values differ first; numbers with a point may lie a little apart."""
    if isinstance(left, float) and isinstance(right, float):
        return None if abs(left - right) <= NEAR else f"{path}: {left} and {right}"
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        pairs = [(left[key], right[key], f"{path}.{key}") for key in left]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = [(one, other, f"{path}[{index}]") for index, (one, other) in enumerate(zip(left, right, strict=True))]
    else:
        return None if left == right else f"{path}: {left!r} and {right!r}"
    return next((apart for pair in pairs if (apart := difference(*pair))), None)


def said(value: Any, path: str = "") -> set[str]:
    """The fields of a body, those inside others too, as `stream_options.include_usage`."""
    if isinstance(value, dict):
        return {f"{path}{key}" for key in value}.union(*(said(one, f"{path}{key}.") for key, one in value.items()))
    return set().union(*(said(one, path) for one in value)) if isinstance(value, list) else set()


def told(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The fields of a model in the same form."""
    for name, one in model.model_fields.items():
        here = f"{path}{one.alias or name}"
        yield here
        for inner in models_in(one.annotation):
            yield from told(inner, f"{here}.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for one in get_args(annotation) for model in models_in(one)]
