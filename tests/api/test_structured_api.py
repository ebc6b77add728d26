"""Fields that give an answer a form: what reaches the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.messages import Constraint, Submit
from tests.api.documented import check_answer
from tests.api.house import House, chat_body, make_house

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
INTEGER = {"type": "integer"}
GBNF = 'root ::= "a" | "b"'


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return make_house(tmp_path_factory.mktemp("model"))


def submitted(house: House, path: str, **fields: Any) -> Submit:
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi"}
    response = house.post(path, {**body, **fields})
    assert response.status_code == 200, response.text
    check_answer(house, response)
    return house.engine.submits[-1]


def refused(house: House, path: str, **fields: Any) -> dict[str, Any]:
    body = chat_body() if path == CHAT else {"model": "m", "prompt": "Hi"}
    before = len(house.engine.submits)
    response = house.post(path, {**body, **fields})
    assert response.status_code == 400, response.text
    check_answer(house, response)
    assert len(house.engine.submits) == before
    error: dict[str, Any] = response.json()["error"]
    assert error["param"] in error["message"]
    assert len(error["message"]) < 400
    return error


def named(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def schema_in(constraint: Constraint | None) -> dict[str, Any]:
    """The schema that the engine was given, without the form of JSON."""
    assert constraint is not None
    (part,) = json.loads(constraint.grammar)["grammars"]
    schema: dict[str, Any] = part["json_schema"]
    assert schema.pop("x-guidance")["whitespace_flexible"] is False
    return schema


def lark_in(constraint: Constraint | None) -> str:
    assert constraint is not None
    (part,) = json.loads(constraint.grammar)["grammars"]
    lark: str = part["lark_grammar"]
    return lark


@BOTH
@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_object", "json_schema": None}}, {"type": "object"}),
        ({"response_format": named(INTEGER)}, INTEGER),
        ({"response_format": named(INTEGER, strict=False, description="d", later=None)}, INTEGER),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": INTEGER}}}, INTEGER),
        ({"structured_outputs": {"json": INTEGER}}, INTEGER),
        ({"structured_outputs": {"json": json.dumps(INTEGER), "regex": None, "choice": None}}, INTEGER),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True, "whitespace_pattern": None}}, {}),
        ({"structured_outputs": {"json": INTEGER, "json_object": False}, "guided_regex": None}, INTEGER),
        ({"guided_json": INTEGER, "response_format": {"type": "text"}, "structured_outputs": None}, INTEGER),
        ({"guided_json": "{}"}, {}),
    ],
)
def test_a_schema_reaches_the_engine(house: House, path: str, fields: dict[str, Any], schema: dict[str, Any]) -> None:
    for more in ({}, {"stream": True}):
        assert schema_in(submitted(house, path, **fields, **more).constraint) == schema


@BOTH
@pytest.mark.parametrize(
    ("name", "value", "lark"),
    [
        ("regex", "[a/b]+", r"start: /[a\/b]+/"),
        ("choice", ["yes", 'n"o'], r'start: "yes" | "n\"o"'),
        ("grammar", 'start: "a"', 'start: "a"'),
        ("grammar", GBNF, "start: "),
    ],
)
def test_other_forms_reach_the_engine(house: House, path: str, name: str, value: Any, lark: str) -> None:
    new = submitted(house, path, structured_outputs={name: value}).constraint
    assert lark in lark_in(new)
    assert submitted(house, path, **{f"guided_{name}": value}).constraint == new


@BOTH
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None, "structured_outputs": None, "guided_json": None, "guided_choice": None},
        {"response_format": {"type": "text"}, "guided_regex": None, "guided_json": None},
        {"guided_grammar": None, "guided_decoding_backend": None, "guided_whitespace_pattern": ""},
    ],
)
def test_nothing_asked(house: House, path: str, fields: dict[str, Any]) -> None:
    assert submitted(house, path, **fields).constraint is None


@BOTH
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        ({"response_format": named("x")}, "response_format.json_schema.schema", "object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "req"),
        ({"response_format": {**named(INTEGER), "type": "text"}}, "response_format.json_schema", "needs"),
        ({"response_format": {**named(INTEGER), "type": "json_object"}}, "response_format.json_schema", "needs"),
        ({"response_format": {"type": "json_object", "schema": INTEGER}}, "response_format.schema", "Unknown"),
        ({"response_format": named(INTEGER, later=1)}, "response_format.json_schema.later", "Unknown"),
        ({"response_format": named({"not": {}})}, "response_format.json_schema.schema", "not"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", ""),
        ({"structured_outputs": {"json": {}, "json_object": True}}, "structured_outputs.json_object", "not supported"),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex, choice and grammar"),
        ({"structured_outputs": {"json": None, "regex": None}}, "structured_outputs", "one of json"),
        ({"structured_outputs": {"structural_tag": None, "later": {}, "backend": ""}}, "structured_outputs", "one of"),
        ({"structured_outputs": {}, "guided_regex": "a"}, "structured_outputs", "one of json"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json", "must not be empty"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "must not be empty"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "must not be empty"),
        ({"guided_json": ""}, "guided_json", "must not be empty"),
        ({"guided_regex": ""}, "guided_regex", "must not be empty"),
        ({"guided_grammar": ""}, "guided_grammar", "must not be empty"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "string"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-ahead"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 4096"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "empty"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json", "schema"),
        ({"guided_choice": []}, "guided_choice", "1 to 4096"),
        ({"guided_choice": "a"}, "guided_choice", "list of strings"),
        ({"guided_choice": ["a", 1] * 100_000}, "guided_choice", "list of strings"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": {"x-guidance": {}}}, "guided_json.x-guidance", "not supported"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "x"),
        ({"guided_regex": []}, "guided_regex", "string"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not supported"),
        ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern", "not supported"),
    ],
)
def test_what_is_refused_names_the_field(
    house: House, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(house, path, **fields)
    assert error["param"] == param
    assert words in error["message"]


@BOTH
def test_one_answer_has_one_form(house: House, path: str) -> None:
    forms: dict[str, dict[str, Any]] = {
        "response_format": {"response_format": {"type": "json_object"}},
        "structured_outputs.json": {"structured_outputs": {"json": {}}},
        "guided_json": {"guided_json": {}},
        "guided_regex": {"guided_regex": "a"},
    }
    for first, one in forms.items():
        for second, other in forms.items():
            if first != second:
                message = refused(house, path, **one, **other)["message"]
                assert first in message
                assert second in message
    both = refused(house, path, structured_outputs={"regex": "a", "choice": ["a"]})
    assert both["param"] == "structured_outputs.choice"
    assert "'structured_outputs.regex'" in both["message"]


@BOTH
def test_fields_that_would_go_on_behind_the_form(house: House, path: str) -> None:
    for field, value in (("min_tokens", 1), ("ignore_eos", True)):
        error = refused(house, path, guided_json={}, **{field: value})
        assert error["param"] == field
        assert "cannot be combined with 'guided_json'" in error["message"]
    assert submitted(house, path, guided_json={}, min_tokens=0, ignore_eos=False).constraint is not None
