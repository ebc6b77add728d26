"""How families of models write calls of tools. Each is a small reader; which one a model needs, its template shows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from server.tools.reading import ToolReader
from server.tools.source import Broken, Waiting

CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END = (
    f"<\uff5c{words}\uff5c>"
    for words in ("tool▁calls▁begin", "tool▁call▁begin", "tool▁sep", "tool▁call▁end", "tool▁calls▁end")
)
"""The marks of DeepSeek."""

_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_MAX_NAME = 64
_CALL_ID = re.compile(r"[a-zA-Z0-9]+")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a model writes calls."""

    family: str
    is_short: bool = False
    """The later form of a family that has two: names stand bare before the arguments."""


class Hermes(ToolReader):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen write it.

    Qwen2.5-Coder leaves the marks out: objects that an answer begins with are calls too, alone or as a block of code.
    """

    openings = ("<tool_call>",)

    def _first(self) -> Waiting[None]:
        self._source.record.clear()
        yield from self._blanks()
        self.needs_arguments = True
        yield from self._try(self._bare)
        self.needs_arguments = False

    def _bare(self) -> Waiting[None]:
        is_block = yield from self._source.has("```json")
        while True:
            yield from self._blanks()
            yield from self._object()
            yield from self._blanks()
            if (yield from self._source.peek()) != "{":
                break
        if is_block:
            yield from self._source.expect("```")

    def _calls(self, opening: str) -> Waiting[None]:
        while True:
            yield from self._blanks()
            yield from self._object()
            yield from self._blanks()
            if (yield from self._source.has("</tool_call>")):
                return
            if (yield from self._source.peek()) != "{":
                raise Broken


class Llama3(ToolReader):
    """{"name": ..., "parameters": {...}} as the whole answer, or behind <|python_tag|>; several with ; between them."""

    openings = ("<|python_tag|>",)
    needs_arguments = True

    def _first(self) -> Waiting[None]:
        self._source.record.clear()
        yield from self._blanks()
        yield from self._try(lambda: self._calls(""))

    def _calls(self, opening: str) -> Waiting[None]:
        while True:
            yield from self._blanks()
            yield from self._object()
            yield from self._blanks()
            if (yield from self._source.has(";")) or (yield from self._source.peek()) == "{":
                continue
            raise Broken  # the rest is content, if there is one


class Mistral(ToolReader):
    """[TOOL_CALLS] and a list of objects, or, for each call, [TOOL_CALLS]name[ARGS]{...}."""

    openings = ("[TOOL_CALLS]",)

    def _calls(self, opening: str) -> Waiting[None]:
        yield from self._blanks()
        if not (yield from self._source.has("[")):
            yield from self._named()
            return
        while True:
            yield from self._blanks()
            yield from self._object()
            yield from self._blanks()
            if (yield from self._source.has("]")):
                return
            yield from self._source.expect(",")

    def _named(self) -> Waiting[None]:
        name = self._known((yield from self._source.run(_NAME, _MAX_NAME)))
        if (yield from self._source.has("[CALL_ID]")):
            yield from self._source.run(_CALL_ID, _MAX_NAME)
        yield from self._source.has("[ARGS]")
        yield from self._blanks()
        yield from self._arguments(name)


class DeepSeek(ToolReader):
    """Its own marks around the type of a call, its name, and its arguments in a block of code or as they are."""

    openings = (CALLS_BEGIN, CALL_BEGIN)

    def _calls(self, opening: str) -> Waiting[None]:
        is_open = opening == self.openings[1]
        while True:
            yield from self._blanks()
            if not is_open:
                yield from self._source.expect(CALL_BEGIN)
            yield from self._call()
            yield from self._blanks()
            yield from self._source.expect(CALL_END)
            yield from self._blanks()
            self._source.record.clear()
            if (yield from self._source.has(CALLS_END)):
                return
            is_open = yield from self._source.has(CALL_BEGIN)
            if not is_open:
                return

    def _call(self) -> Waiting[None]:
        """Either type, name and a block of code (V3, R1), or name and arguments (V3.1)."""
        word = yield from self._source.run(_NAME, _MAX_NAME)
        yield from self._source.expect(SEPARATOR)
        name = "" if word != "function" else (yield from self._source.run(_NAME, _MAX_NAME))
        yield from self._blanks()
        is_block = bool(name) and (yield from self._source.has("```json"))
        yield from self._blanks()
        yield from self._arguments(self._known(name or word))
        if is_block:
            yield from self._blanks()
            yield from self._source.expect("```")


FAMILIES: Mapping[str, type[ToolReader]] = MappingProxyType(
    {"hermes": Hermes, "llama3": Llama3, "mistral": Mistral, "deepseek": DeepSeek}
)
"""By their names in --tool-call-parser."""

MARKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hermes": ("<tool_call>", "</tool_call>"),
        "llama3": ("<|python_tag|>",),
        "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        "deepseek": (CALLS_BEGIN, CALL_BEGIN, SEPARATOR, CALL_END, CALLS_END),
    }
)
"""What a reader has to see, also where it is a special token, whose name is no text otherwise."""

_OTHERS = ("<function=", "<arg_key>", "<parameter")
"""Marks of families that share an opening with one of ours, and go on differently."""


def family_of(template: str) -> str:
    """The family whose calls a chat template writes; empty if it is none of ours."""
    if "<tool_call>" in template:
        return "" if any(mark in template for mark in _OTHERS) else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if CALL_BEGIN in template:
        return "deepseek"
    is_llama = "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template)
    return "llama3" if is_llama else ""


def dialect_of(template: str, setting: str) -> Dialect | None:
    """How the model of a chat template writes calls: as `setting` says, or as the template shows if that is "auto"."""
    family = family_of(template) if setting == "auto" else setting
    if not family:
        return None
    is_short = {"mistral": "[ARGS]" in template, "deepseek": "```json" not in template}.get(family, False)
    return Dialect(family, is_short)
