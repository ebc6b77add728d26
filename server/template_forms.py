"""The form in which a chat template takes messages, found out by trying it: what it does not know is never lost.

Templates differ in what they know: whether there is a role "developer" or "system", whether several system messages
may come, whether content is a text or a list of parts, whether there are tools and how calls of them are written. None
of them says so, and many drop what they do not know.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from server.errors import InvalidRequest, UnsupportedParameter
from server.template_tools import (
    PROBE_ID,
    PROBE_TOOL,
    Message,
    call_marks,
    is_written_as_python,
    probe_calls,
    split_calls,
    with_arguments_written,
)


@dataclass(frozen=True, slots=True)
class Extras:
    """What a template is given beside messages."""

    add_generation_prompt: bool = True
    """The assistant's header follows."""
    tools: Sequence[dict[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


Render = Callable[[Sequence[Message], Extras], str]
"""Messages and the rest to a text. Raises InvalidRequest."""

_MAX_KEPT = 256
"""Sequences of roles whose form is remembered; each costs a rendering or a few of short marks."""
_MAX_KEPT_ROLES = 256
_NO_ROLE = "qzvjk"
"""A role that no template knows."""
_LEADING = ("system", "developer")


@dataclass(frozen=True, slots=True)
class Form:
    """How messages are shaped for a template."""

    has_developer: bool = True
    """Give "developer" as it is, not as "system"."""
    joins_system: bool = False
    """Make one system message of those that lead the conversation, in their order."""
    folds_system: bool = False
    """Put it at the head of the first user turn."""
    has_parts: bool = False
    """Give content as a list with one text part."""
    writes_arguments: bool = False
    """Give the arguments of calls as JSON text, not as objects."""
    splits_calls: bool = False
    """Make two turns of one with text and calls."""

    def shape(self, messages: Sequence[Message]) -> list[Message]:
        """The same messages in this form; none is changed in place."""
        turns = [
            {**message, "role": "system"} if message["role"] == "developer" and not self.has_developer else message
            for message in messages
        ]
        if self.joins_system or self.folds_system:
            turns = self._joined(turns)
        if self.writes_arguments:
            turns = [with_arguments_written(turn) for turn in turns]
        if self.splits_calls:
            turns = [part for turn in turns for part in split_calls(turn)]
        if self.has_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn.get("content") or ""}]} for turn in turns]
        return turns

    def _joined(self, turns: list[Message]) -> list[Message]:
        num_leading = next((index for index, turn in enumerate(turns) if turn["role"] not in _LEADING), len(turns))
        leading, rest = turns[:num_leading], turns[num_leading:]
        if not leading:
            return turns
        texts = [turn.get("content") or "" for turn in leading]
        if self.folds_system and rest and rest[0]["role"] == "user":
            return [{**rest[0], "content": "\n\n".join([*texts, rest[0].get("content") or ""])}, *rest[1:]]
        return [{**leading[0], "role": "system", "content": "\n\n".join(texts)}, *rest]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What decides in which form a turn can be given."""

    role: str
    num_calls: int = 0
    has_text: bool = True
    """Looked at beside calls only."""

    @classmethod
    def of(cls, message: Message) -> _Kind:
        """The kind of a turn."""
        num_calls = len(message.get("tool_calls") or ())
        return cls(message["role"], num_calls, has_text=bool(not num_calls or message.get("content")))

    def probe(self, index: int) -> Message:
        """A turn of this kind with marks in it."""
        message: Message = {"role": self.role, "content": f"qx{index}zj" if self.has_text else ""}
        if self.num_calls:
            message["tool_calls"] = probe_calls(index, self.num_calls)
        if self.role == "tool":
            message["tool_call_id"] = PROBE_ID
        return message

    def lost(self, index: int, text: str) -> InvalidRequest | None:
        """The fault of a template that left out of `text` what stands in such a turn."""
        if self.has_text and f"qx{index}zj" not in text:
            if self.num_calls:
                where = f"messages[{index}].content"
                words = f"text beside calls of tools in one turn, as in messages[{index}]"
            else:
                where = f"messages[{index}].role"
                words = f"a message with the role '{self.role}' where messages[{index}] is"
        elif any(mark not in text for mark in call_marks(index, self.num_calls)):
            where, words = f"messages[{index}].tool_calls", f"calls of tools, as in messages[{index}]"
        else:
            return None
        return InvalidRequest(f"the model's chat template has no place for {words}: it would be lost", param=where)


class Forms:
    """What one template takes. Owns the forms found so far, by the kinds of a conversation's turns.

    A form is found with a mark in the place of each content: all marks have to come out. So the texts of a request
    decide nothing, and a template may alter them as it likes (trim them, drop earlier reasoning).
    """

    def __init__(self, render: Render):
        self._render = render
        self._kept: OrderedDict[object, Form] = OrderedDict()

    def find(self, messages: Sequence[Message], extras: Extras) -> Form:
        """The first form in which nothing of such a conversation is lost.

        Raises InvalidRequest: the template's own words when it refuses the turns in every form, else the name of a
        message, or of the tools, for which it has no place.
        """
        kinds = tuple(map(_Kind.of, messages))
        key = (kinds, extras.add_generation_prompt, bool(extras.tools), json.dumps([*extras.variables.items()]))
        form = self._kept.get(key)
        if form is not None:
            self._kept.move_to_end(key)
            return form
        form = self._try(kinds, replace(extras, tools=[PROBE_TOOL] if extras.tools else ()))
        if len(kinds) <= _MAX_KEPT_ROLES:
            self._kept[key] = form
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return form

    def _try(self, kinds: tuple[_Kind, ...], extras: Extras) -> Form:
        messages = [kind.probe(index) for index, kind in enumerate(kinds)]
        fault: InvalidRequest | None = None
        for form in self._forms(kinds):
            try:
                text = self._render(form.shape(messages), extras).lower()
            except InvalidRequest as error:
                fault = fault or error
                continue
            lost = self._lost(kinds, extras, text)
            if lost is None:
                return form
            fault = fault or lost
        assert fault is not None, "there is always a form to try"
        raise fault

    def _lost(self, kinds: tuple[_Kind, ...], extras: Extras, text: str) -> InvalidRequest | None:
        """What a rendered trial shows to be wrong with its form."""
        if extras.tools and PROBE_TOOL["function"]["name"] not in text:
            return UnsupportedParameter("the model's chat template has no place for tools", param="tools")
        if is_written_as_python(text):
            return InvalidRequest("the model's chat template cannot write the arguments of calls", param="messages")
        return next((lost for index, kind in enumerate(kinds) if (lost := kind.lost(index, text))), None)

    def _forms(self, kinds: tuple[_Kind, ...]) -> Iterator[Form]:
        """Forms worth trying, the most faithful first."""
        roles = tuple(kind.role for kind in kinds)
        yield from self._candidates(roles)
        if not any(kind.num_calls for kind in kinds):
            return
        has_both = any(kind.num_calls and kind.has_text for kind in kinds)
        for splits_calls in (False, True) if has_both else (False,):
            for writes_arguments in (False, True):
                if splits_calls or writes_arguments:
                    for form in self._candidates(roles):
                        yield replace(form, splits_calls=splits_calls, writes_arguments=writes_arguments)

    def _candidates(self, roles: tuple[str, ...]) -> Iterator[Form]:
        """Forms by what they do with roles and content, the most faithful first."""
        for has_parts in (False, True):
            plain = Form(has_developer=self._knows_developer, has_parts=has_parts)
            leads = bool(roles) and roles[0] in _LEADING
            if not leads or self._knows_system:
                yield plain
                if "developer" in roles and plain.has_developer:
                    yield replace(plain, has_developer=False)
            if leads:
                if self._knows_system and len(roles) > 1 and roles[1] in _LEADING:
                    yield replace(plain, has_developer=False, joins_system=True)
                yield replace(plain, has_developer=False, folds_system=True)

    @cached_property
    def _knows_developer(self) -> bool:
        """Whether "developer" is more to the template than any word: one that only prints roles has not learned it."""
        known, unknown = self._sample("developer"), self._sample(_NO_ROLE)
        return known is not None and (unknown is None or known != unknown.replace(_NO_ROLE, "developer"))

    @cached_property
    def _knows_system(self) -> bool:
        """Whether "system" is anything to the template: not if it is treated as no role at all, and "user" is not."""
        known, unknown = self._sample("system"), self._sample(_NO_ROLE)
        return known != unknown or self._sample("user") == unknown

    def _sample(self, role: str) -> str | None:
        """What the template makes of a message with this role before a user's; None if it refuses or drops it."""
        messages = [{"role": role, "content": "qx0zj"}, {"role": "user", "content": "qx1zj"}]
        for has_parts in (False, True):
            try:
                text = self._render(Form(has_parts=has_parts).shape(messages), Extras())
            except InvalidRequest:
                continue
            if "qx0zj" in text.lower():
                return text
        return None
