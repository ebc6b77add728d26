"""Items of a conversation: what a client sends of them, made whole, and the chat messages that say the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from server.api.responses.objects import COMPLETED, Item, new_id
from server.api.responses.schema import FunctionCall, FunctionCallOutput, InputItem, InputMessage, ReasoningItem


def input_items(given: str | Sequence[InputItem]) -> list[Item]:
    """The items of an input, each with an id of its own."""
    if isinstance(given, str):
        given = [InputMessage(role="user", content=[given])]
    return [_item(one) for one in given]


def _item(one: InputItem) -> Item:
    if isinstance(one, InputMessage):
        is_answer = one.role == "assistant"
        parts: list[Any] = [
            {"type": "output_text", "text": text, "annotations": []} if is_answer else _input_text(text)
            for text in one.content
        ]
        return _whole("msg", {"type": "message", "role": one.role, "content": parts})
    if isinstance(one, FunctionCall):
        return _whole("fc", one.model_dump())
    if isinstance(one, FunctionCallOutput):
        output = one.output[0] if len(one.output) == 1 else [_input_text(text) for text in one.output]
        return _whole("fco", {"type": one.type, "call_id": one.call_id, "output": output})
    assert isinstance(one, ReasoningItem), "there are no other items"
    summary = [part.model_dump() for part in one.summary or ()]
    content = [part.model_dump() for part in one.content or ()]
    return _whole("rs", {"type": "reasoning", "summary": summary, "content": content})


def _input_text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


def _whole(prefix: str, item: Item) -> Item:
    return {"id": new_id(prefix), "status": COMPLETED, **item}


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """The messages of a chat. Thinking, text and calls that follow each other are one turn of the assistant."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        kind = item["type"]
        if kind == "message" and item["role"] != "assistant":
            content = "\n".join(part["text"] for part in item["content"])
            messages.append({"role": item["role"], "content": content})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _output(item["output"])})
        else:
            _add_to_turn(messages, item)
    return messages


def _add_to_turn(messages: list[dict[str, Any]], item: Item) -> None:
    """Go on with the assistant's turn, or begin one where the last message is none that could hold this too."""
    kind = item["type"]
    turn: dict[str, Any] = messages[-1] if messages else {"role": "", "content": ""}
    is_full = kind != "function_call" and bool(turn["content"] or turn.get("tool_calls"))
    if turn["role"] != "assistant" or is_full:
        turn = {"role": "assistant", "content": ""}
        messages.append(turn)
    if kind == "message":
        turn["content"] = "\n".join(part["text"] for part in item["content"])
    elif kind == "function_call":
        function = {"name": item["name"], "arguments": item["arguments"]}
        turn.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
    else:
        thought = "\n".join(part["text"] for part in item["content"])
        turn["reasoning_content"] = "\n".join(text for text in (turn.get("reasoning_content"), thought) if text)


def _output(output: Any) -> str:
    return output if isinstance(output, str) else "\n".join(part["text"] for part in output)
