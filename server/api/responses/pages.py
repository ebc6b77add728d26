"""A page of a list, as query parameters ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequest, UnsupportedParameter

DEFAULT_LIMIT = 20
MAX_LIMIT = 100


@dataclass(frozen=True, slots=True)
class Page:
    """Which entries of a list, and in which order."""

    limit: int = DEFAULT_LIMIT
    is_descending: bool = True
    after: str | None = None

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Page:
        """The page that a query asks for. Raises InvalidRequest or UnsupportedParameter."""
        for name in query:
            if name not in ("after", "limit", "order", "include"):
                raise UnsupportedParameter(f"Unknown query parameter '{name[:80]}'.", param=name[:80])
        limit = query.get("limit", str(DEFAULT_LIMIT))
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= MAX_LIMIT):
            raise InvalidRequest(f"'limit' must be a number from 1 to {MAX_LIMIT}, got '{limit[:80]}'.", param="limit")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"'order' must be 'asc' or 'desc', got '{order[:80]}'.", param="order")
        return cls(int(limit), order == "desc", query.get("after"))

    def cut(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The page. Raises InvalidRequest if there is no item to come after."""
        ordered = [*reversed(items)] if self.is_descending else [*items]
        start = 0
        if self.after is not None:
            ids = [item["id"] for item in ordered]
            if self.after not in ids:
                raise InvalidRequest(f"'after' names no item: '{self.after[:80]}'.", param="after")
            start = ids.index(self.after) + 1
        data = ordered[start : start + self.limit]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": start + self.limit < len(ordered),
        }


def page_parameters() -> list[dict[str, Any]]:
    """The query parameters, as /openapi.json tells them."""
    return [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT}},
        {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
        {"name": "after", "in": "query", "schema": {"type": "string"}},
        {"name": "include", "in": "query", "description": "Without effect.", "schema": {"type": "string"}},
    ]
