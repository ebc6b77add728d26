"""A request of the Messages API as a chat request, and the names of its fields for errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from server.api.messages.schema import (
    CountRequest,
    MessageRequest,
    TextBlock,
    ThinkingBlock,
    ToolChoiceParam,
    ToolParam,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from server.api.schema import ChatRequest
from server.api.translation import as_chat

_MODES = {"auto": "auto", "any": "required", "none": "none"}


def names(wish: CountRequest) -> dict[str, str]:
    """Fields of chat, as the client of this request knows them."""
    return {
        "continue_final_message": f"messages[{len(wish.messages) - 1}]",
        "reasoning_effort": "output_config.effort" if wish.thinking is None else "thinking",
        "response_format": "output_config.format",
        "response_format.json_schema": "output_config.format",
        "stop": "stop_sequences",
        "tool_choice.function": "tool_choice",
        "tools[].function": "tools[]",
        "tools[].function.parameters": "tools[].input_schema",
    }


def chat_request(wish: MessageRequest) -> ChatRequest:
    """The chat request that asks for the same. Raises what chat refuses."""
    body = {
        **_prompt(wish),
        "max_tokens": wish.max_tokens,
        "stop": wish.stop_sequences or None,
        "stream": wish.stream,
        "temperature": wish.temperature,
        "top_p": wish.top_p,
        "top_k": wish.top_k,
        "seed": wish.seed,
        "speculative": wish.speculative.model_dump() if wish.speculative else None,
    }
    return as_chat(body, names(wish))


def chat_prompt(wish: CountRequest) -> ChatRequest:
    """The chat request with the same prompt."""
    return as_chat(_prompt(wish), names(wish))


def _prompt(wish: CountRequest) -> dict[str, Any]:
    choice = wish.tool_choice
    continues = wish.messages[-1].role == "assistant"
    return {
        "model": wish.model,
        "messages": _chat_messages(wish),
        "tools": [_tool(tool) for tool in wish.tools] if wish.tools else None,
        "tool_choice": _tool_choice(choice) if choice is not None else None,
        "parallel_tool_calls": _parallel(choice),
        "reasoning_effort": _effort(wish),
        "include_reasoning": False if wish.thinking and wish.thinking.display == "omitted" else None,
        "response_format": _response_format(wish),
        "continue_final_message": True if continues else None,
        "add_generation_prompt": False if continues else None,
    }


def _chat_messages(wish: CountRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if wish.system:
        messages.append({"role": "system", "content": "\n".join(wish.system)})
    for turn in wish.messages:
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "assistant":
            messages.append(_answer(turn.content))
        else:
            messages += _turns(turn)
    return messages


def _answer(blocks: Sequence[Any]) -> dict[str, Any]:
    """A turn of the assistant: its texts, its calls, its thinking."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "\n".join(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    if calls:
        message["tool_calls"] = calls
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
    return {"id": block.id, "type": "function", "function": function}


def _turns(turn: Turn) -> list[dict[str, Any]]:
    """A turn of the client: what calls came to are messages of their own, and so is the text around them."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            if texts:
                messages.append({"role": turn.role, "content": "\n".join(texts)})
                texts = []
            content = "\n".join(block.content or ())
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock):
            texts.append(block.text)
    if texts or not messages:
        messages.append({"role": turn.role, "content": "\n".join(texts)})
    return messages


def _tool(tool: ToolParam) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoiceParam) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return _MODES[choice.type]


def _parallel(choice: ToolChoiceParam | None) -> bool | None:
    """Whether several calls are asked for; None if nothing is said."""
    if choice is None or choice.disable_parallel_tool_use is None:
        return None
    return not choice.disable_parallel_tool_use


def _effort(wish: CountRequest) -> str | None:
    effort = wish.output_config.effort if wish.output_config else None
    if wish.thinking is None:
        return effort
    return "none" if wish.thinking.type == "disabled" else effort or "medium"


def _response_format(wish: CountRequest) -> dict[str, Any] | None:
    given = wish.output_config.format if wish.output_config else None
    if given is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given.schema_, "strict": True}}
