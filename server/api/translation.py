"""What the APIs beside chat share: strict reading of their bodies, and their requests as chat requests.

A request of another API is checked by that API's own schema, then said as a chat request, which goes the way of every
chat request. So a field does here what it does there, and errors are told in the names that the client used.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from server.api.fields import NOTHING, clean, unsupported
from server.api.parse import explain, parse
from server.api.schema import MAX_PARTS, ChatRequest
from server.errors import InvalidRequest, ServingError

Model = TypeVar("Model", bound=BaseModel)
Names = Mapping[str, str]
"""Fields of a chat request, each with the name that the client knows it by; `[]` stands for any index."""

_MAX_SHOWN = 80
_INDEX = re.compile(r"\[\d+\]")


def _tell(schema: dict[str, Any]) -> None:
    """Say in a model's JSON schema what passes beside its fields."""
    without_effect = schema.pop("without_effect", ())
    schema["properties"].update({name: {"description": "Without effect."} for name in without_effect})
    schema["additionalProperties"] = NOTHING


class Strict(BaseModel):
    """A value of a request, checked as it came. Subclasses name in `WITHOUT_EFFECT` what they pass over."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_tell)


def told_without_effect(names: Set[str]) -> ConfigDict:
    """The configuration of a model that passes over these fields."""

    def tell(schema: dict[str, Any]) -> None:
        schema["without_effect"] = sorted(names)
        _tell(schema)

    return ConfigDict(json_schema_extra=tell)


def read(
    model: type[Model],
    value: Any,
    path: str,
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    without_effect: Set[str] = frozenset(),
) -> Model:
    """`value`, found at `path` of the body, as a model. Raises InvalidRequest, which names the field."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"Invalid '{path}': must be an object.", param=path)
    known = {field.alias or name for name, field in model.model_fields.items()}
    value = clean(value, known, f"{path}." if path else "", neutral or {}, without_effect)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise explain(error, path) from None


def array(value: Any, path: str, most: int) -> list[Any]:
    """`value`, if it is an array of at most `most` entries."""
    if not isinstance(value, list):
        raise InvalidRequest(f"Invalid '{path}': must be an array.", param=path)
    if len(value) > most:
        raise InvalidRequest(f"'{path}' may hold at most {most} entries, got {len(value)}.", param=path)
    return value


def kind_of(value: Any, path: str) -> str:
    """The `type` of an object of several kinds."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"Invalid '{path}': must be an object.", param=path)
    kind = value.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"'{path}.type' is required: a string.", param=f"{path}.type")
    return kind


def not_supported(path: str, kind: str, why: str) -> ServingError:
    """The refusal of an object of a kind that is not honoured."""
    return unsupported(path, f"'{path}' is of type '{kind[:_MAX_SHOWN]}': {why}.")


def plain_text(value: Any, path: str) -> str:
    """`value`, if it is text."""
    if not isinstance(value, str):
        raise InvalidRequest(f"Invalid '{path}': must be a string.", param=path)
    if "\x00" in value:
        raise InvalidRequest(f"Invalid '{path}': must not hold the character NUL.", param=path)
    return value


def texts(value: Any, path: str, kinds: Set[str], without_effect: Set[str]) -> list[str]:
    """The texts of `value`: a text, or a list of parts of these kinds, each with a `text`."""
    if isinstance(value, str):
        return [plain_text(value, path)]
    if not isinstance(value, list):
        raise InvalidRequest(f"Invalid '{path}': must be a string or an array of text parts.", param=path)
    found = []
    for index, part in enumerate(array(value, path, MAX_PARTS)):
        where = f"{path}[{index}]"
        kind = kind_of(part, where)
        if kind not in kinds:
            raise not_supported(where, kind, "this model reads text only")
        clean(part, {"type", "text"}, f"{where}.", {}, without_effect)
        found.append(plain_text(part.get("text"), f"{where}.text"))
    return found


def as_chat(body: dict[str, Any], names: Names) -> ChatRequest:
    """The chat request that says the same. Raises what chat refuses, in the client's words."""
    with renaming(names):
        return parse(ChatRequest, {name: value for name, value in body.items() if value is not None})


@contextlib.contextmanager
def renaming(names: Names) -> Iterator[None]:
    """Errors that leave the body name the client's fields, not those of chat.

    In the message that is the field at fault alone, where it is told first: what else stands between quotes may be the
    client's own value.
    """
    try:
        yield
    except ServingError as error:
        if error.param is not None:
            known = _renamed(error.param, names)
            error.message = error.message.replace(f"'{error.param}'", f"'{known}'", 1)
            error.param = known
        error.args = (error.message,)
        raise


def _renamed(param: str, names: Names) -> str:
    """A path in the client's words: its longest known beginning is exchanged.

    What lies inside of `messages` is elsewhere in the client's body, so there the beginning alone is told.
    """
    ends = [found.start() for found in re.finditer(r"[.\[]", param)]
    for end in (len(param), *reversed(ends)):
        known = names.get(_INDEX.sub("[]", param[:end]))
        if known is not None:
            for index in _INDEX.findall(param[:end]):
                known = known.replace("[]", index, 1)
            return known if param.startswith("messages") else known + param[end:]
    return param
