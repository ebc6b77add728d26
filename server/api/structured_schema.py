"""What clients may send to give an answer a form: `response_format`, `structured_outputs`, the older `guided_...`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from server.api.fields import NOTHING, clean
from server.grammar import MAX_CHARS, MAX_CHOICES

NEUTRAL_IN_STRUCTURED: dict[str, tuple[Any, ...]] = {
    "backend": (),
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (True, False),  # without blanks an answer satisfies either
    "disable_fallback": (True, False),  # there is none
    "json_object": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}
"""Fields of `structured_outputs` that vLLM knows, with the values that say what happens anyway."""


def _schema_or_text(value: Any) -> dict[str, Any] | str:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema: an object, or a text that holds one")
    if value == "":
        raise ValueError("must not be empty")
    return value


def _choices(value: Any) -> list[str]:
    """Its length is judged where a grammar is made of it."""
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("must be a list of strings")
    return value


_Schema = Annotated[
    dict[str, Any] | str,
    PlainValidator(_schema_or_text),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string", "minLength": 1, "maxLength": MAX_CHARS}]}),
]
_Choices = Annotated[
    list[str],
    PlainValidator(_choices),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "maxItems": MAX_CHOICES,
        }
    ),
]
_Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARS)]
"""Who sends an empty one wants a form, and must not get free text: null is what asks for nothing."""


def _tell_of_nothing(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = NOTHING


def _tell_of_one(schema: dict[str, Any]) -> None:
    _tell_of_nothing(schema)
    schema["oneOf"] = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in schema["properties"]
    ]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_tell_of_nothing)


class NamedSchema(_Strict):
    """A JSON schema that the answer satisfies, whatever `strict` says; `name` and `description` have no effect."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Strict):
    """Text, any JSON object, or JSON that satisfies a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(_Strict):
    """What the answer has to satisfy; exactly one of these."""

    model_config = ConfigDict(json_schema_extra=_tell_of_one)

    json_: Annotated[_Schema | None, Field(alias="json")] = None
    regex: _Text | None = None
    choice: _Choices | None = None
    grammar: _Text | None = None


class Structured(_Strict):
    """Fields of both generation routes."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    guided_regex: _Text | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Text | None = None


def clean_structured(body: dict[str, Any]) -> dict[str, Any]:
    """Those of these fields that are objects, without what asks for nothing. Raises UnsupportedParameter."""
    cleaned = {}
    if isinstance(asked := body.get("structured_outputs"), dict):
        known = {"json", "regex", "choice", "grammar"}
        cleaned["structured_outputs"] = clean(asked, known, "structured_outputs.", NEUTRAL_IN_STRUCTURED, frozenset())
    if isinstance(form := body.get("response_format"), dict):
        form = clean(form, ResponseFormat.model_fields.keys(), "response_format.", {}, frozenset())
        if isinstance(named := form.get("json_schema"), dict):
            known = {"name", "description", "schema", "strict"}
            form = {**form, "json_schema": clean(named, known, "response_format.json_schema.", {}, frozenset())}
        cleaned["response_format"] = form
    return cleaned
