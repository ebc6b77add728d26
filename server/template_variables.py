"""What a request says to a chat template beside its messages: `chat_template_kwargs` and `reasoning_effort`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import InvalidRequest, UnsupportedParameter

RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("raise_exception", "strftime_now", "conversation", "tokenize", "return_dict", "return_tensors"),
    }
)
"""Names that are set otherwise, or mean something to the one who renders."""
_SWITCHES = ("enable_thinking", "thinking")
"""Variables of templates whose models think or not, as they are told."""
_USUAL_EFFORTS = ("none", "medium")
"""Efforts that say what happens anyway where a template knows none: the usual one, and none of a model without."""
MAX_SHOWN = 80


def variables_for(
    kwargs: Mapping[str, Any], effort: str | None, read: frozenset[str], special: Mapping[str, str], *, thinks: bool
) -> dict[str, Any]:
    """The variables of a template that reads the names `read`. Raises InvalidRequest where one would have no effect.

    What `kwargs` says of thinking goes before `effort`.
    """
    found = {} if effort is None else _of_effort(effort, read, thinks=thinks)
    for name, value in kwargs.items():
        param = f"chat_template_kwargs.{name[:MAX_SHOWN]}"
        if name in RESERVED or name in special:
            raise InvalidRequest(f"'{param}' is set by the server and cannot be set by a request.", param=param)
        if name in read:
            found[name] = value
        elif not (name in _SWITCHES and value is False and not thinks):
            raise UnsupportedParameter(f"'{param}' would have no effect: the model's chat template does not read it.",
                                       param=param)  # fmt: skip
    return found


def _of_effort(effort: str, read: frozenset[str], *, thinks: bool) -> dict[str, Any]:
    found: dict[str, Any] = {name: effort != "none" for name in _SWITCHES if name in read}
    if "reasoning_effort" in read:
        found["reasoning_effort"] = effort
    if found or (effort in _USUAL_EFFORTS and not (thinks and effort == "none")):
        return found
    raise UnsupportedParameter(
        f"'reasoning_effort' {effort!r} would have no effect: the model's chat template reads no such thing.",
        param="reasoning_effort",
    )
