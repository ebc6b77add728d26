"""Does a server do what its /openapi.json says? Requests that fit the document, that do not, and the corners of it.

    python -m tests.bench.conformance --url http://127.0.0.1:8000 [--cases 2000] [--seed 1]

Schemathesis makes the requests. A fault is a 5xx, no answer in time, an error that has not the API's shape, an answer
that the document does not tell of, or a request that it forbids and that is answered all the same. Prints the faults
and a table; the exit status is 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import unittest
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import jsonschema
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi import checks

APIOperation = Any
Case = Any
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
BODY_CHECKS = [checks.response_schema_conformance]
WEIGHT = 8
"""How many more cases an operation with a body has than one without."""
MAX_TOKENS = 8
LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
"""The fields that bound an answer."""
PLAIN = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "input": "Hi", "tokens": [5, 6]}
"""What every other request asks, as the rules of turns cannot be told in a schema."""
FEW = 3
"""Optional fields that every other request is left with: with all of them nearly every one is refused."""
TIMEOUT_S = 20
MAX_SHOWN = 2000
"""Characters of a request that came to a fault."""


@dataclass
class Found:
    """What came of all cases. Owns the counts."""

    phases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    @property
    def num_cases(self) -> int:
        """Requests that were sent."""
        return sum(self.phases.values())


class Tester:
    """Sends cases to one server and judges the answers. Owns nothing of it."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        self._document: dict[str, Any] = requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
        self._model = requests.get(f"{url}/v1/models", timeout=TIMEOUT_S).json()["data"][0]["id"]
        self._random = random.Random(seed)
        self._seed = seed

    def run(self, num_cases: int) -> Found:
        """Send so many cases, a few at once."""
        found = Found()
        with ThreadPoolExecutor(4) as pool:
            for phase, case, status, took_s, faults in pool.map(lambda one: self._try(*one), self._cases(num_cases)):
                found.phases[phase] += 1
                found.statuses[case.operation.label, status] += 1
                found.faults.update(faults)
                found.slowest_s = max(found.slowest_s, took_s)
        return found

    def _cases(self, num_cases: int) -> list[tuple[str, Case]]:
        """Two thirds are drawn at random, the rest are corners; an operation with a body has more of them."""
        operations = [one.ok() for one in self._schema.get_all_operations()]
        weights = [WEIGHT if list(one.body) else 1 for one in operations]
        cases = []
        for operation, weight in zip(operations, weights, strict=True):
            number = max(1, num_cases * weight // (3 * sum(weights)))
            for mode in MODES:
                drawn = self._drawn(operation, mode, number)
                cases += [
                    (mode.value, self._fit(case, thin=mode is MODES[0] and index % 2 == 0))
                    for index, case in enumerate(drawn)
                ]
        corners = [list(self._corners(one)) for one in operations]
        room = max(0, num_cases - len(cases))
        chosen, others = [], []
        for operation_corners, weight in zip(corners, weights, strict=True):
            self._random.shuffle(operation_corners)
            share = room * weight // sum(weights)
            chosen += operation_corners[:share]
            others += operation_corners[share:]
        self._random.shuffle(others)
        chosen += others[: room - len(chosen)]
        cases += [("coverage", self._fit(case, thin=False)) for case in chosen]
        self._random.shuffle(cases)
        return cases

    def _drawn(self, operation: APIOperation, mode: Any, number: int) -> list[Case]:
        found: list[Case] = []

        @hypothesis.seed(self._seed)
        @hypothesis.settings(
            max_examples=number,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def collect(case: Case) -> None:
            found.append(case)

        try:
            collect()
        except (hypothesis.errors.Unsatisfiable, unittest.SkipTest):
            return []  # nothing of this operation can be wrong
        return found[:number]

    def _corners(self, operation: APIOperation) -> Iterator[Case]:
        config = self._schema.config.generation_for(operation=operation)
        return self._schema.iter_coverage_cases(operation, generation_modes=[*MODES], generation_config=config)

    def _fit(self, case: Case, *, thin: bool) -> Case:
        """The case with a model that is served and a short answer, so that it gets as far as the other fields."""
        if not isinstance(body := with_integers(case.body), dict):
            return case
        if thin:
            optional = [name for name in body if name not in {"model", "max_tokens", *PLAIN}]
            left_out = set(self._random.sample(optional, max(0, len(optional) - FEW)))
            body = {name: PLAIN.get(name, value) for name, value in body.items() if name not in left_out}
        if isinstance(body.get("model"), str):
            body = {**body, "model": self._model}
        for name in LIMITS.get(case.operation.path, ()):
            limit = body.get(name, MAX_TOKENS + 1)
            if type(limit) is int and MAX_TOKENS < limit < 2**31:
                body = {**body, name: MAX_TOKENS}
        case.body = body
        return case

    def _try(self, phase: str, case: Case) -> tuple[str, Case, int, float, list[str]]:
        """(phase, case, status, seconds, faults)."""
        name = f"{case.operation.label} ({phase})"
        try:
            response = case.call(base_url=self._url, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            return phase, case, 0, TIMEOUT_S, [f"{name}: {type(error).__name__}"]
        faults: list[str] = []
        # What stands in the document for a stream is the data of its events; Schemathesis takes it for all of an event.
        is_stream = "event-stream" in str(response.headers.get("content-type"))
        try:
            case.validate_response(response, checks=[one for one in CHECKS if one not in BODY_CHECKS or not is_stream])
        except (FailureGroup, Failure) as group:
            for failure in getattr(group, "exceptions", [group]):
                faults.append(f"{name}: {response.status_code} {failure.title}: {failure.message[:300]}")
        faults += [f"{name}: {response.status_code} {fault}" for fault in self._shape(case, response)]
        if faults:
            faults[-1] += f" | {json.dumps(case.body, default=str)[:MAX_SHOWN]} | {response.text[:200]}"
        return phase, case, response.status_code, response.elapsed, faults

    def _shape(self, case: Case, response: Any) -> Iterator[str]:
        """What is wrong with an error, or with the events of a stream."""
        if response.status_code >= 400:
            try:
                value = response.json()
                jsonschema.validate(value, ANTHROPIC if case.operation.path.startswith("/v1/messages") else OPENAI)
            except (ValueError, jsonschema.ValidationError) as error:
                yield f"an error of another shape: {str(error).splitlines()[0][:200]}"
        elif "event-stream" in str(response.headers.get("content-type")):
            told = self._document["paths"][case.operation.path][case.operation.method]["responses"]["200"]["content"]
            schema = {**told["text/event-stream"]["schema"], "components": self._document["components"]}
            validator = jsonschema.Draft202012Validator(schema)
            for event in events_of(response.text):
                for error in itertools.islice(validator.iter_errors(event), 1):
                    yield f"an event that is not told of: {error.message[:200]}"


def with_integers(value: Any) -> Any:
    """`value` with 5 for 5.0, which is an integer in a JSON schema and none for this server."""
    if isinstance(value, dict):
        return {name: with_integers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [with_integers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def events_of(text: str) -> list[Any]:
    """The data of a stream's events, without the mark of its end."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def _closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_TEXT = {"type": "string", "minLength": 1}
OPENAI = _closed(error=_closed(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code=_TEXT))
ANTHROPIC = {
    **_closed(type={"const": "error"}, error=_closed(type=_TEXT, message=_TEXT), request_id=_TEXT),
    "required": ["type", "error"],
}


def main() -> int:
    """Send, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = Tester(options.url.rstrip("/").removesuffix("/v1"), options.seed).run(options.cases)
    for fault, count in found.faults.most_common():
        print(f"{count}x {fault}")
    statuses = sorted({status for _, status in found.statuses})
    print(f"{'operation':<44}", *(f"{status:>6}" for status in statuses))
    for label in sorted({label for label, _ in found.statuses}):
        print(f"{label:<44}", *(f"{found.statuses[label, status]:>6}" for status in statuses))
    by_status: Counter[int] = Counter()
    for (_, status), number in found.statuses.items():
        by_status[status] += number
    row = {"cases": found.num_cases, "phases": dict(found.phases), "statuses": dict(sorted(by_status.items()))}
    print(json.dumps({"bench": "conformance", **row, "faults": len(found.faults), "slowest_s": found.slowest_s}))
    return int(bool(found.faults))


if __name__ == "__main__":
    sys.exit(main())
