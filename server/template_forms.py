"""The form in which a chat template takes messages, found out by trying it: what it does not know is never lost.

Templates differ in what they know: whether there is a role "developer" or "system", whether several system messages
may come, whether content is a text or a list of parts. None of them says so, and many drop what they do not know.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from server.errors import InvalidRequest

Message = dict[str, Any]
"""One turn of a chat: `role`, `content` and whatever else a template may read."""

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether the assistant's header follows, to a text. Raises InvalidRequest."""

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

    def shape(self, messages: Sequence[Message]) -> list[Message]:
        """The same messages in this form; none is changed in place."""
        turns = [
            {**message, "role": "system"} if message["role"] == "developer" and not self.has_developer else message
            for message in messages
        ]
        if self.joins_system or self.folds_system:
            turns = self._joined(turns)
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


class Forms:
    """What one template takes. Owns the forms found so far, by the roles of a conversation.

    A form is found with a mark in the place of each content: all marks have to come out. So the texts of a request
    decide nothing, and a template may alter them as it likes (trim them, drop earlier reasoning).
    """

    def __init__(self, render: Render):
        self._render = render
        self._kept: OrderedDict[tuple[tuple[str, ...], bool], Form] = OrderedDict()

    def find(self, roles: Sequence[str], add_generation_prompt: bool) -> Form:
        """The first form in which nothing of a conversation with these roles is lost.

        Raises InvalidRequest: the template's own words when it refuses the roles in every form, else the name of a
        message for which it has no place.
        """
        key = (tuple(roles), add_generation_prompt)
        form = self._kept.get(key)
        if form is not None:
            self._kept.move_to_end(key)
            return form
        form = self._try(key[0], add_generation_prompt)
        if len(roles) <= _MAX_KEPT_ROLES:
            self._kept[key] = form
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return form

    def _try(self, roles: tuple[str, ...], add_generation_prompt: bool) -> Form:
        marks = [f"qx{index}zj" for index in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        fault: InvalidRequest | None = None
        for form in self._candidates(roles):
            try:
                text = self._render(form.shape(messages), add_generation_prompt).lower()
            except InvalidRequest as error:
                fault = fault or error
                continue
            lost = next((index for index, mark in enumerate(marks) if mark not in text), None)
            if lost is None:
                return form
            where = f"messages[{lost}].role"
            fault = fault or InvalidRequest(
                f"the model's chat template has no place for a message with the role '{roles[lost]}' where "
                f"messages[{lost}] is: it would be lost",
                param=where,
            )
        assert fault is not None, "there is always a form to try"
        raise fault

    def _candidates(self, roles: tuple[str, ...]) -> Iterator[Form]:
        """Forms worth trying, the most faithful first."""
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
                text = self._render(Form(has_parts=has_parts).shape(messages), True)
            except InvalidRequest:
                continue
            if "qx0zj" in text.lower():
                return text
        return None
