"""A model's chat template: messages in, prompt text out, in a sandbox, by the conventions of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import count
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import InvalidRequest, StartupError
from server.prompt_messages import Ending
from server.template_forms import Extras, Forms
from server.template_tools import Message
from server.template_variables import variables_for
from server.tools.thinking import thinks


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's part for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Give back the statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _fresh_mark(messages: Sequence[Message]) -> str:
    """A word that no message holds."""
    texts = [value for message in messages for value in message.values() if isinstance(value, str)]
    return next(mark for number in count() if not any((mark := f"qx{number}endzj") in text for text in texts))


def _until(mark: str, text: str) -> str:
    """A rendered text up to the mark behind its last message. Raises InvalidRequest.

    A blank follows the mark: a template that takes it away trims messages, and would trim the one that is continued.
    """
    end = text.rfind(mark)
    if end < 0:
        raise InvalidRequest(
            "the model's chat template does not show the end of the last message, so it cannot be continued",
            param="continue_final_message",
        )
    kept = text[:end] if text[end + len(mark) :].startswith(" ") else text[:end].rstrip()
    return kept.replace(f"{mark} ", "").replace(mark, "")  # a template may show its last message elsewhere too


class ChatTemplate:
    """Renders messages with a model's own template. Owns the compiled template and what was learned of it.

    The template comes with the model and is not trusted: it runs in jinja's immutable sandbox. That bounds neither its
    time nor its memory: a server renders in a process that it can end (server.prompt_pool).
    """

    def __init__(self, source: str, special_tokens: dict[str, str]):
        """Raises StartupError when it does not compile."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._reads = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise StartupError(f"the model's chat template does not compile: {error}") from None
        self._special_tokens = special_tokens
        self._thinks = thinks(source)
        self._reads_reasoning = "reasoning_content" in source
        self._forms = Forms(self._render)

    def render(
        self,
        messages: Sequence[Message],
        *,
        ending: Ending = "header",
        tools: Sequence[dict[str, Any]] = (),
        kwargs: Mapping[str, Any] | None = None,
        effort: str | None = None,
    ) -> str:
        """The prompt text, up to and including the header of the assistant's turn (unless told otherwise).

        Messages are given in the form that the template takes (server.template_forms). Raises InvalidRequest with the
        template's own words when it refuses them, and by name when it has no place for one, or for tools, and when it
        does not read what `kwargs` or `effort` (of reasoning) would tell it.
        """
        variables = variables_for(kwargs or {}, effort, self._reads, self._special_tokens, thinks=self._thinks)
        extras = Extras(ending == "header", tools, variables)
        if not self._reads_reasoning:
            messages = [_without_reasoning(message) for message in messages]
        form = self._forms.find(messages, extras)
        if ending != "open":
            return self._render(form.shape(messages), extras)
        mark = _fresh_mark(messages)
        last = {**messages[-1], "content": f"{messages[-1].get('content') or ''}{mark} "}
        return _until(mark, self._render(form.shape([*messages[:-1], last]), extras))

    def _render(self, turns: Sequence[Message], extras: Extras) -> str:
        try:
            text = self._template.render(
                **extras.variables,
                **self._special_tokens,
                messages=list(turns),
                tools=list(extras.tools) or None,
                documents=None,
                add_generation_prompt=extras.add_generation_prompt,
            )
            text.encode()
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        except UnicodeEncodeError:
            raise InvalidRequest(
                "the model's chat template cannot render these messages: it yields half of a surrogate pair, which is "
                "not a character",
                param="messages",
            ) from None
        except MemoryError:
            raise
        except Exception as error:
            # A template is a small program of the model's author; what it trips over came with the messages.
            reason = f"{type(error).__name__}: {error}"[:300]
            raise InvalidRequest(
                f"the model's chat template cannot render these messages ({reason})", param="messages"
            ) from None
        return text


def _without_reasoning(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "reasoning_content"}
