"""Answers bound by JSON schemas: are they valid, the same with speculation off, and won in fewer steps than free text?

    python -m tests.bench.structured --url http://127.0.0.1:8000/v1 [--schemas 300] [--temperature 0 1]

Asks a running server for each schema of tests/schemas.py three times: speculation on, off, and on without the schema.
Prints a line for each fault and a table; the exit status is 1 if a complete answer is not valid or two texts differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema

from tests.schemas import make_schemas

_CHECKER = jsonschema.FormatChecker(
    [name for name in jsonschema.FormatChecker.checkers if name != "time"]  # it knows no offsets
)


@dataclass
class Found:
    """What came of all schemas at one temperature."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)

    def per_step(self, arm: str) -> float:
        """Tokens won in a step."""
        return self.tokens[arm] / max(1, self.steps[arm])


class Asker:
    """Asks one server. Owns nothing of it."""

    def __init__(self, client: httpx.AsyncClient, model: str, options: argparse.Namespace) -> None:
        self._client, self._model, self._options = client, model, options
        self._turn = asyncio.Semaphore(options.concurrency)

    async def ask(self, schema: Any, fields: dict[str, Any]) -> tuple[str, str, int, int]:
        """(text, finish reason, tokens, steps). Raises: httpx.HTTPStatusError."""
        text = f"Answer with one JSON value of this form: {json.dumps(schema, ensure_ascii=False)}"
        body = {"model": self._model, "messages": [{"role": "user", "content": text[:1500]}], **fields}
        async with self._turn:
            answer = await self._client.post("chat/completions", json=body)
        answer.raise_for_status()
        told = answer.json()
        choice, tokens = told["choices"][0], int(told["usage"]["completion_tokens"])
        accepted = int(told["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"])
        return choice["message"]["content"], choice["finish_reason"], tokens, tokens - accepted

    async def try_schema(self, name: str, schema: Any, temperature: float, found: Found) -> None:
        """All arms of one schema."""
        usual = {"temperature": temperature, "seed": 7, "max_tokens": self._options.max_tokens}
        bound = {"response_format": {"type": "json_schema", "json_schema": {"name": "value", "schema": schema}}}
        texts = {}
        for arm, fields in (("on", bound), ("off", bound), ("free", {})):
            speculative = {"enabled": arm != "off", "metrics": True}
            try:
                text, reason, tokens, steps = await self.ask(schema, {**usual, **fields, "speculative": speculative})
            except httpx.HTTPStatusError as error:
                found.counts["refused"] += 1
                found.faults.append(f"{name}: {error.response.status_code} {error.response.text[:200]}")
                return
            texts[arm] = text
            found.tokens[arm] += tokens
            found.steps[arm] += steps
            if arm == "on":
                self._judge(name, schema, (text, reason), found)
        if texts["on"] != texts["off"]:
            found.counts["differ"] += 1
            found.faults.append(f"{name}: {texts['on'][:80]!r} with speculation, {texts['off'][:80]!r} without")

    def _judge(self, name: str, schema: Any, answer: tuple[str, str], found: Found) -> None:
        text, reason = answer
        if reason != "stop":
            found.counts["cut"] += 1
            return
        found.counts["complete"] += 1
        try:
            jsonschema.validate(json.loads(text), schema, format_checker=_CHECKER)
            found.counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            found.faults.append(f"{name}: {text[:120]!r} {str(error).splitlines()[0][:120]}")


async def run(options: argparse.Namespace) -> list[Found]:
    """All schemas at each temperature."""
    results = []
    async with httpx.AsyncClient(base_url=options.url, timeout=600) as client:
        model = (await client.get("models")).json()["data"][0]["id"]
        asker = Asker(client, model, options)
        every = max(1, 300 // options.schemas)
        schemas = list(make_schemas().items())[::every][: options.schemas]
        for temperature in options.temperature:
            found = Found()
            await asyncio.gather(*(asker.try_schema(*one, temperature, found) for one in schemas))
            results.append(found)
    return results


def main() -> int:
    """Ask, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1/")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=4)
    options = parser.parse_args()
    options.url = options.url.rstrip("/") + "/"
    rows = []
    for temperature, found in zip(options.temperature, asyncio.run(run(options)), strict=True):
        print(*found.faults, sep="\n")
        row = {"temperature": temperature, **{name: found.counts[name] for name in _COUNTS}}
        row |= {f"tokens_per_step_{arm}": round(found.per_step(arm), 2) for arm in ("on", "free", "off")}
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items()), sep="   ")
    print(json.dumps({"bench": "structured", "schemas": options.schemas, "rows": rows}))
    return int(any(row["valid"] < row["complete"] or row["differ"] or row["refused"] for row in rows))


_COUNTS = ("complete", "valid", "cut", "differ", "refused")

if __name__ == "__main__":
    sys.exit(main())
