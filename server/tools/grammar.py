"""A grammar in which an answer can only call tools as it was asked to, with arguments that satisfy their schemas.

It is written in llguidance's dialect of Lark, with each tool's JSON Schema inside, around it the marks of the model's
family. Where a mark is one token of the vocabulary the grammar names the token, and does not let it be spelled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from server.schema_form import settled
from server.tools.families import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, Dialect
from server.tools.thinking import CLOSE, OPEN

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How models were taught to write JSON. With free blanks one of them could go on for ever."""
FORM_KEY = "x-guidance"
"""Where a schema says how its values are written; a client's does not."""
_FORM = "form"
_ANY = r"/(?s:.*)/"

TokenOf = Callable[[str], int | None]
"""The token that is this text alone; None if the text is written with several."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called."""

    name: str
    schema: dict[str, Any]
    """Of its arguments; that they are an object need not be said."""
    is_strict: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The schema, with what need not be said."""
        return {"type": "object", **self.schema}


class Thinking(Enum):
    """Whether thinking may come before the calls."""

    NONE = "none"
    MAYBE = "maybe"
    OPEN = "open"
    """The prompt has begun it."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Which calls an answer may hold."""

    tools: Sequence[Tool]
    dialect: Dialect
    is_required: bool
    """At least one call and no text; else any text, and calls that are right."""
    is_parallel: bool
    """Several calls in one answer."""

    @property
    def is_bound(self) -> bool:
        """Whether a grammar has to see to it: calls are forced, or have to be exact or single."""
        return self.is_required or not self.is_parallel or any(tool.is_strict for tool in self.tools)

    def is_exact(self, tool: Tool) -> bool:
        """Whether the arguments of a tool have to satisfy its schema."""
        return self.is_required or tool.is_strict


def call_grammar(calls: Calls, token_of: TokenOf, thinking: Thinking = Thinking.NONE) -> str:
    """The grammar of the whole answer, as Lark text."""
    writer = _Writer(token_of)
    family = _FAMILIES[calls.dialect.family](writer, calls)
    body = family.calls() if calls.is_required else family.mixed()
    rules = [f"start: {writer.thinking(thinking)}{body}", *family.rules(), *writer.rules]
    return "\n".join(rules) + "\n"


def after_thinking(grammar: str, thinking: Thinking, token_of: TokenOf) -> str:
    """A grammar in llguidance's own form, with room for thinking before what it asks for."""
    if thinking is Thinking.NONE:
        return grammar
    first, *others = json.loads(grammar)["grammars"]
    writer = _Writer(token_of)
    top = "\n".join([f"start: {writer.thinking(thinking)}@{_FORM}", *writer.rules])
    named = [{"lark_grammar": top}, {**first, "name": _FORM}, *others]
    return json.dumps({"grammars": named}, ensure_ascii=False)


class _Writer:
    """Writes marks and texts. Owns the rules that these need."""

    def __init__(self, token_of: TokenOf):
        self.rules: list[str] = []
        self._token_of = token_of

    def mark(self, text: str) -> str:
        """A mark, as its token where it has one."""
        token = self._token_of(text)
        return _quoted(text) if token is None else f"<[{token}]>"

    def has_token(self, mark: str) -> bool:
        """Whether a mark is one token."""
        return self._token_of(mark) is not None

    def up_to(self, mark: str, name: str) -> str:
        """Any text, and the first `mark` behind it."""
        if self.has_token(mark):
            return f"{self.text_without(mark, name.upper())} {self.mark(mark)}"
        self.rules.append(f"{name}[lazy]: /(?s:.*){_in_regex(mark)}/")
        return name

    def text_without(self, mark: str, name: str) -> str:
        """Any text in which `mark` is not spelled."""
        self.rules.append(f"{name}: {_ANY} & ~/(?s:.*){_in_regex(mark)}(?s:.*)/")
        return name

    def thinking(self, thinking: Thinking) -> str:
        """What may come first."""
        if thinking is Thinking.NONE:
            return ""
        self.rules.append(f"thoughts: {self.up_to(CLOSE, 'thought')} /[ \\n]{{0,4}}/")
        return "thoughts " if thinking is Thinking.OPEN else f"({self.mark(OPEN)} thoughts)? "


class _Family:
    """One family's syntax. `opening` begins calls in the middle of text."""

    opening: str
    arguments = "arguments"
    between = '"\\n"'

    def __init__(self, writer: _Writer, calls: Calls):
        self.writer = writer
        self.asked = calls

    def calls(self) -> str:
        """One call, or several, and nothing else."""
        return f"call ({self.between} call)*" if self.asked.is_parallel else "call"

    def mixed(self) -> str:
        """Text with calls in it, each behind its opening."""
        writer, most = self.writer, "*" if self.asked.is_parallel else "?"
        if writer.has_token(self.opening):
            text = writer.text_without(self.opening, "TEXT")
            return f"{text} ({writer.mark(self.opening)} {self.behind_opening()} {text}){most}"
        head = writer.up_to(self.opening, "head")
        return f"({head} {self.behind_opening()}){most} {writer.text_without(self.opening, 'TEXT')}"

    def text_then(self, calls: str) -> str:
        """Text, and then perhaps all calls behind one opening."""
        text = self.writer.text_without(self.opening, "TEXT")
        if self.writer.has_token(self.opening):
            return f"{text} ({self.writer.mark(self.opening)} {calls})?"
        return f"({text} | {self.writer.up_to(self.opening, 'head')} {calls})"

    def behind_opening(self) -> str:
        """The rest of a call that an opening begins."""
        raise NotImplementedError

    def rules(self) -> list[str]:
        """The rules of calls."""
        raise NotImplementedError

    def bodies(self, begin: Callable[[str], str], end: str) -> list[str]:
        """For each tool, its arguments between what stands before and behind them."""
        names = [f"body_{index}" for index in range(len(self.asked.tools))]
        rules = [f"body: {' | '.join(names)}"]
        for index, tool in enumerate(self.asked.tools):
            rules.append(f"body_{index}: {begin(tool.name)} args_{index} {end}")
            rules.append(f"args_{index}: %json {self._schema(tool)}")
        return rules

    def objects(self) -> list[str]:
        """The bodies as objects with name and arguments."""
        return self.bodies(lambda name: _quoted(f'{{"name": "{name}", "{self.arguments}": '), '"}"')

    def _schema(self, tool: Tool) -> str:
        """The schema of a tool's arguments; where only other tools are to be exact, an object."""
        schema = settled(tool.arguments) if self.asked.is_exact(tool) else {"type": "object"}
        return json.dumps({**schema, FORM_KEY: _LAYOUT}, ensure_ascii=False)


class _Hermes(_Family):
    opening = "<tool_call>"

    def behind_opening(self) -> str:
        return "rest"

    def rules(self) -> list[str]:
        opening, closing = self.writer.mark(self.opening), self.writer.mark("</tool_call>")
        return [f"call: {opening} rest", f'rest: "\\n" body "\\n" {closing}', *self.objects()]


class _Llama3(_Family):
    opening = "<|python_tag|>"
    arguments = "parameters"
    between = '"; "'

    def mixed(self) -> str:
        """An answer that begins with a bracket is a call, and so is all behind the tag, where there is one."""
        self.writer.rules.append(r"TEXT: /(\s*[^{\s](?s:.*))?/")
        tagged = f" {self.writer.mark(self.opening)} calls" if self.writer.has_token(self.opening) else ""
        self.writer.rules.append(f"calls: {self.calls()}")
        return f"(TEXT{f' | TEXT {tagged}' if tagged else ''} | calls)"

    def rules(self) -> list[str]:
        return ["call: body", *self.objects()]


class _Mistral(_Family):
    opening = "[TOOL_CALLS]"
    between = ""

    def calls(self) -> str:
        if self.asked.dialect.is_short:
            return super().calls()
        return f"{self.writer.mark(self.opening)} list"

    def mixed(self) -> str:
        if self.asked.dialect.is_short:
            return super().mixed()
        return self.text_then("list")

    def behind_opening(self) -> str:
        return "body"

    def rules(self) -> list[str]:
        opening = self.writer.mark(self.opening)
        if self.asked.dialect.is_short:
            between = self.writer.mark("[ARGS]")
            return [f"call: {opening} body", *self.bodies(lambda name: f"{_quoted(name)} {between}", "")]
        more = ' (", " body)*' if self.asked.is_parallel else ""
        return [f'list: " "? "[" body{more} "]"', *self.objects()]


class _DeepSeek(_Family):
    opening = CALLS_BEGIN

    def calls(self) -> str:
        return f"{self.writer.mark(self.opening)} list"

    def mixed(self) -> str:
        return self.text_then("list")

    def rules(self) -> list[str]:
        mark, is_short = self.writer.mark, self.asked.dialect.is_short
        between = "" if is_short else '"\\n" '
        more = f" ({between}call)*" if self.asked.is_parallel else ""
        separator = mark(SEPARATOR)
        if is_short:
            bodies = self.bodies(lambda name: f"{_quoted(name)} {separator}", "")
        else:
            bodies = self.bodies(
                lambda name: f'"function" {separator} {_quoted(name + chr(10) + "```json" + chr(10))}', '"\\n```"'
            )
        call = f"call: {mark(CALL_BEGIN)} body {mark(CALL_END)}"
        return [f"list: call{more} {mark(CALLS_END)}", call, *bodies]


_FAMILIES: dict[str, type[_Family]] = {
    "hermes": _Hermes,
    "llama3": _Llama3,
    "mistral": _Mistral,
    "deepseek": _DeepSeek,
}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _in_regex(text: str) -> str:
    """`text` inside a regular expression between slashes."""
    return re.sub(r"([^\w<>\uff5c\u2581])", r"\\\1", text)
