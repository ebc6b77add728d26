"""Whether an answer is one that /openapi.json tells of."""

from __future__ import annotations

import re
from typing import Any

import httpx
from pydantic import BaseModel

from server.api import answer_schema
from server.api.messages import answer_schema as messages_schema
from server.api.responses import answer_schema as responses_schema
from tests.api.house import House, events

_MODULES = (responses_schema, messages_schema, answer_schema)


def check_answer(house: House, response: httpx.Response) -> None:
    """Fail unless status, kind and shape of an answer stand in the document under its route."""
    method, path = response.request.method, response.request.url.path
    told = operation(house, method, path)["responses"]
    assert str(response.status_code) in told, f"{method} {path}: {response.status_code}"
    kind = response.headers["content-type"].partition(";")[0]
    schema = told[str(response.status_code)]["content"][kind]["schema"]
    if kind == "text/event-stream":
        found = events(response)
        if "anyOf" in schema:
            assert found.pop() == "[DONE]"
        for event in found:
            _fit(event, [one["$ref"] for one in schema.get("anyOf", [schema])])
    elif kind == "application/json":
        _fit(response.json(), [schema["$ref"]])
    else:
        assert schema == {"type": "string"}
    for header in told[str(response.status_code)].get("headers", ()):
        assert int(response.headers[header]) > 0


def operation(house: House, method: str, path: str) -> dict[str, Any]:
    """What the document says of a route."""
    paths = house.app.openapi()["paths"]
    (pattern,) = (one for one in paths if re.fullmatch(_pattern(one), path))
    found: dict[str, Any] = paths[pattern][method.lower()]
    return found


def _pattern(path: str) -> str:
    """Matches the addresses of a route; the names of models may hold slashes."""
    return re.sub(r"\{\w+\}", ".+" if "model" in path else "[^/]+", path)


def _fit(value: Any, refs: list[str]) -> None:
    """`value` has the shape of the first of these schemas, of the last if it is an error."""
    name = refs["error" in value and len(refs) > 1].rsplit("/", 1)[1]
    module = next(one for one in _MODULES if hasattr(one, name))
    model: type[BaseModel] = getattr(module, name)
    model.model_validate(value)
