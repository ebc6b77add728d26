"""JSON schemas in a form that the compiler of grammars gets right, and whether a value of one ever ends."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

_JUST_OVER_ZERO = 1e-15
_IN_SCHEMA = frozenset(
    {
        *("additionalItems", "additionalProperties", "contains", "contentSchema", "items", "propertyNames"),
        *("unevaluatedItems", "unevaluatedProperties", "prefixItems"),
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
    }
)
"""Keywords whose values are schemas, or lists of schemas."""
_NAMED_IN_SCHEMA = frozenset(
    {"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"}
)
"""Keywords whose values are objects of schemas. Their names are the client's, and may be those of keywords."""


def settled(schema: Any) -> Any:
    """`schema` in other words where llguidance 1.9 would let wrong values pass, or refuses what asks for nothing.

    Between an exclusive bound of zero and another one that is less than one away from it, it lets zero itself pass. So
    the bound becomes one beside zero: what is lost are numbers that nobody writes.
    """
    root = _copy(schema)
    pending, met = [root], set()
    while pending:
        found = pending.pop()
        if isinstance(found, dict) and id(found) not in met:  # a reference may lead to it once more
            met.add(id(found))
            _settle(found)
            pending += _inner(found, root)
    return root


def _settle(schema: dict[str, Any]) -> None:
    """The same for one schema, in place, without those inside it. A bound that is no number is left to be refused."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    least, most = schema.get("minimum", _JUST_OVER_ZERO), schema.get("maximum", -_JUST_OVER_ZERO)
    if _is_zero(schema.get("exclusiveMinimum")) and _is_number(least):
        del schema["exclusiveMinimum"]
        schema["minimum"] = max(_JUST_OVER_ZERO, least)
    if _is_zero(schema.get("exclusiveMaximum")) and _is_number(most):
        del schema["exclusiveMaximum"]
        schema["maximum"] = min(-_JUST_OVER_ZERO, most)


def _inner(schema: dict[str, Any], root: Any) -> list[Any]:
    """What stands directly inside a schema in the place of a schema, or is referred to as one."""
    found: list[Any] = []
    for name, value in schema.items():
        if name in _IN_SCHEMA:
            found += value if isinstance(value, list) else [value]
        elif name in _NAMED_IN_SCHEMA and isinstance(value, dict):
            found += value.values()
        elif name == "$ref" and isinstance(value, str):  # it may lead to where no keyword does
            found.append(_target(root, f"#{value.partition('#')[2]}"))
    return found


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _is_zero(value: Any) -> bool:
    return _is_number(value) and value == 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Ends:
    """Which values end. Owns the references met so far, in order, and those that are known to end."""

    def __init__(self, root: Any):
        self._root = root
        self._met: list[str] = []
        self._known: set[str] = set()
        self._ending: set[str] = set()

    def judge(self) -> bool:
        """Whether the root ends. A reference is taken not to, until that is shown, round after round."""
        is_ending = self._ends(self._root)
        for ref in self._met:  # grows meanwhile
            self._ends(_target(self._root, ref))
        num_known = -1
        while not is_ending and len(self._ending) > num_known:
            num_known = len(self._ending)
            for ref in reversed(self._met):  # the last met lead on to the fewest others
                if ref not in self._ending and self._ends(_target(self._root, ref)):
                    self._ending.add(ref)
            is_ending = self._ends(self._root)
        return is_ending

    def _ends(self, schema: Any) -> bool:
        """Whether a value can end, as far as is known; what is not understood can."""
        if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
            return True
        if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#") and ref not in self._ending:
            if ref not in self._known:
                self._known.add(ref)
                self._met.append(ref)
            return False
        # Every part is looked at: a reference that is not met now might never be.
        judged = [self._ends(part) for part in _list(schema.get("allOf"))]
        for name in ("anyOf", "oneOf"):
            branches = [self._ends(part) for part in _list(schema.get(name))]
            judged.append(any(branches) or not branches)
        kind = schema.get("type")
        needed = _properties(schema) if kind == "object" else _items(schema) if kind == "array" else []
        return all(judged + [self._ends(part) for part in needed])


def can_end(schema: Any) -> bool:
    """Whether a value of `schema` can ever end: a required property may hold the like of itself, and that another."""
    return _Ends(schema).judge()


def _properties(schema: dict[str, Any]) -> list[Any]:
    """The schemas of required properties."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    return [properties.get(name) for name in _list(schema.get("required")) if isinstance(name, str)]


def _items(schema: dict[str, Any]) -> list[Any]:
    """The schemas of items that have to be there."""
    least, first = schema.get("minItems"), _list(schema.get("prefixItems"))
    if not isinstance(least, int):
        return []
    return first[:least] + [schema.get("items")] * (least > len(first))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _target(root: Any, ref: str) -> Any:
    """What a reference points to; None, which ends, if it is none of the plain ones."""
    found = root
    if ref not in ("#", "#/") and not ref.startswith("#/"):
        return None
    for step in ref[2:].split("/") if len(ref) > 2 else []:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and len(step) < 9 and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, dict):
            found = found.get(step)
        else:
            return None
    return found
