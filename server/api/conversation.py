"""A conversation as it was asked for: what the chat template is given, and how the answer is to be read and bound."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.api.chat_ending import chat_ending
from server.api.schema import ChatRequest, Message
from server.api.tool_schema import Choice, ToolDefinition
from server.detokenize import TokenText
from server.errors import InvalidRequest, UnsupportedParameter
from server.grammar import from_lark, from_schema
from server.messages import Constraint
from server.prompt import Scribe
from server.prompt_messages import Ending
from server.tools.answer import Reading
from server.tools.families import Dialect
from server.tools.grammar import FORM_KEY, Calls, Thinking, Tool, after_thinking, call_grammar
from server.tools.thinking import CLOSE, MARKS, OPEN

_FORMS = (
    "response_format",
    "structured_outputs",
    *(f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar")),
)
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function for which none was given."""
_SAYS_NO_MORE = frozenset({"type", "properties", "required", "title", "description", "$schema", "$id", "$comment"})
"""Keys that let no property into an object which lists none."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One request's conversation, checked."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    """As the template sees them."""
    kwargs: Mapping[str, Any]
    effort: str | None
    calls: Calls | None
    """Which calls the answer may hold; None where no tool may be called."""
    thinks: bool
    """Whether the model may think first."""
    splits_thinking: bool
    shows_thinking: bool
    ending: Ending = "header"

    async def prompt(self, scribe: Scribe, max_model_len: int) -> tuple[int, ...]:
        """Its prompt. Raises InvalidRequest where the template refuses, ContextTooLong over `max_model_len`."""
        return await scribe.chat(
            self.messages, max_model_len, ending=self.ending, tools=self.tools, kwargs=self.kwargs, effort=self.effort
        )

    def reading(self, prompt: Sequence[int], text: TokenText) -> Reading:
        """How the answers to this prompt are read."""
        return Reading(
            family=self.calls.dialect.family if self.calls is not None else "",
            names=frozenset(tool.name for tool in self.calls.tools) if self.calls is not None else frozenset(),
            is_bound=self.calls is not None and self.calls.is_required,
            splits_thinking=self.splits_thinking,
            starts_thinking=self.splits_thinking and thinking_after(prompt, text) is Thinking.OPEN,
            shows_thinking=self.shows_thinking,
        )

    def after_thinking(self, form: Constraint | None, prompt: Sequence[int], text: TokenText) -> Constraint | None:
        """A form that the answer has to have, with room for thinking before it."""
        if form is None or not form.grammar or not self.thinks:
            return form
        return msgspec.structs.replace(
            form, grammar=after_thinking(form.grammar, thinking_after(prompt, text), text.added_token)
        )

    async def constraint(self, prompt: Sequence[int], scribe: Scribe) -> Constraint | None:
        """What binds the answers, if calls were forced, or have to be exact or single.

        Raises InvalidRequest for a schema that cannot be compiled.
        """
        calls = self.calls
        if calls is None or not calls.is_bound:
            return None
        thinking = thinking_after(prompt, scribe.text) if self.thinks else Thinking.NONE
        # Those who check it know no tokens of the model, only letters.
        await scribe.check(from_lark(call_grammar(calls, lambda _: None, thinking), "tools"))
        for tool in calls.tools:
            if calls.is_exact(tool) and '"$ref"' in json.dumps(tool.schema):  # does a value of it ever end?
                await scribe.check(from_schema(tool.arguments, "tools"))
        return Constraint(from_lark(call_grammar(calls, scribe.text.added_token, thinking), "tools").text)


def thinking_after(prompt: Sequence[int], text: TokenText) -> Thinking:
    """Whether a model thinks at the start of its answer: the prompt may have opened that, or closed it."""
    tail = text.tail(prompt, MARKS).rstrip()
    if tail.endswith(OPEN):
        return Thinking.OPEN
    return Thinking.NONE if tail.endswith(CLOSE) else Thinking.MAYBE


def conversation_of(wish: ChatRequest, scribe: Scribe) -> Conversation:
    """The conversation of a request. Raises InvalidRequest."""
    tools = _allowed(wish)
    if tools:
        _check_alone(wish)
    choice: Choice = wish.tool_choice or Choice("auto")
    calls = None
    if tools:
        calls = Calls(
            tools=[_tool(tool) for tool in tools],
            dialect=_dialect(scribe),
            is_required=choice.mode == "required",
            is_parallel=not choice.is_one_function if wish.parallel_tool_calls is None else wish.parallel_tool_calls,
        )
        _check_end(wish, calls)
    is_split = scribe.thinks and (wish.separate_reasoning is not False or wish.include_reasoning is False)
    return Conversation(
        messages=turns_of(wish.messages),
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
        kwargs=wish.chat_template_kwargs or {},
        effort=wish.reasoning_effort,
        calls=calls,
        thinks=scribe.thinks,
        splits_thinking=is_split,
        shows_thinking=wish.include_reasoning is not False,
        ending=chat_ending(wish),
    )


def _allowed(wish: ChatRequest) -> list[ToolDefinition]:
    """The tools that may be called; none if the request says so. Raises InvalidRequest where the two do not fit."""
    tools = wish.tools or []
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools[{index}].function.name"
            raise InvalidRequest(f"'{param}' is '{name}', as that of another tool.", param=param)
        if FORM_KEY in (tools[index].function.parameters or {}):
            param = f"tools[{index}].function.parameters.{FORM_KEY}"
            raise UnsupportedParameter(f"'{param}' is not supported.", param=param)
    choice: Choice = wish.tool_choice or Choice("auto")
    if not tools and (choice.mode == "required" or choice.names):
        raise InvalidRequest("'tool_choice' asks for a call, and there are no 'tools'.", param="tool_choice")
    for name in choice.names or ():
        if name not in names:
            raise InvalidRequest(f"'tool_choice' names '{name[:80]}', which is none of 'tools'.", param="tool_choice")
    if choice.mode == "none":
        return []
    return [tool for tool in tools if choice.names is None or tool.function.name in choice.names]


def _check_alone(wish: ChatRequest) -> None:
    """Raise InvalidRequest where tools are asked for together with what also gives the answer a form.

    A form is one of the content. An answer that has to be a call has none, so a form may be asked for beside it.
    """
    must_call = wish.tool_choice is not None and wish.tool_choice.mode == "required"
    for name in _FORMS:
        form = getattr(wish, name)
        if not must_call and form and getattr(form, "type", "") != "text":
            raise InvalidRequest(
                f"'{name}' cannot be combined with 'tools', unless 'tool_choice' is \"none\" or asks for a call.",
                param=name,
            )


def _check_end(wish: ChatRequest, calls: Calls) -> None:
    """An answer that is bound ends where its grammar says: raise InvalidRequest for fields that say something else."""
    for name in ("min_tokens", "ignore_eos"):
        if calls.is_bound and getattr(wish, name):
            why = "a 'tool_choice' that asks for a call" if calls.is_required else _BINDING
            raise InvalidRequest(
                f"'{name}' cannot be combined with {why}: the grammar says where the answer ends.", param=name
            )


_BINDING = "'tools' that are strict, or of which one is called at most"


def _dialect(scribe: Scribe) -> Dialect:
    if scribe.dialect is None:
        raise UnsupportedParameter(
            "'tools' are not supported with this model: its chat template shows no way of calling tools that this "
            "server reads (hermes, llama3, mistral, deepseek; see --tool-call-parser).",
            param="tools",
        )
    return scribe.dialect


def _tool(tool: ToolDefinition) -> Tool:
    function = tool.function
    schema = dict(_NO_ARGUMENTS) if function.parameters is None else function.parameters
    if schema.get("properties") == {} and not schema.get("required") and schema.keys() <= _SAYS_NO_MORE:
        schema = {**schema, "additionalProperties": False}  # how many clients say that there are no arguments
    return Tool(function.name, schema, is_strict=bool(function.strict))


def turns_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat template sees them."""
    return [_turn(message) for message in messages]


def _turn(message: Message) -> dict[str, Any]:
    """A message as a chat template sees it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    return turn
