"""The output of a response as it grows: its items, and the events that tell of them in OpenAI's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server.api.responses.objects import COMPLETED, IN_PROGRESS, Item, new_id
from server.tools.events import Argued, CallBegun, Event, Said, Thought

Tell = Callable[..., None]
"""Takes the type of an event and its fields."""


class Output:
    """Owns the items, and the text of the one that is still open."""

    def __init__(self, tell: Tell, new_call_id: Callable[[], str]):
        self.items: list[Item] = []
        self._tell = tell
        self._new_call_id = new_call_id
        self._open = ""  # type of the open item
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, event: Event, logprobs: Sequence[dict[str, Any]] = ()) -> None:
        """More of the answer."""
        if isinstance(event, Said):
            self._say(event.text, logprobs)
        elif isinstance(event, Thought):
            self._think(event.text)
        elif isinstance(event, CallBegun):
            self._begin_call(event.name)
        else:
            self._argue(event)

    def end(self, status: str) -> None:
        """Nothing follows. An answer without anything in it is an empty message."""
        if not self.items:
            self._say("", ())
        self._close(status)

    def drop_open(self) -> None:
        """Forget the item that is not whole, without an event: a client might act on a call that was cut short."""
        if self._open:
            self.items.pop()
            self._open = ""

    def _say(self, text: str, logprobs: Sequence[dict[str, Any]]) -> None:
        if self._open != "message":
            self._begin({"id": new_id("msg"), "type": "message", "role": "assistant", "content": []})
            self._tell("response.content_part.added", **self._place(), content_index=0, part=_text_part("", []))
        if text or logprobs:
            self._texts.append(text)
            self._logprobs += logprobs
            delta = {"content_index": 0, "delta": text, "logprobs": logprobs}
            self._tell("response.output_text.delta", **self._place(), **delta)

    def _think(self, text: str) -> None:
        if self._open != "reasoning":
            self._begin({"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []})
            self._tell("response.content_part.added", **self._place(), content_index=0, part=_thought_part(""))
        self._texts.append(text)
        self._tell("response.reasoning_text.delta", **self._place(), content_index=0, delta=text)

    def _begin_call(self, name: str) -> None:
        call = {"type": "function_call", "call_id": self._new_call_id(), "name": name, "arguments": ""}
        self._begin({"id": new_id("fc"), **call})

    def _argue(self, event: Argued) -> None:
        self._texts.append(event.text)
        self._tell("response.function_call_arguments.delta", **self._place(), delta=event.text)

    def _begin(self, item: Item) -> None:
        if self._open:
            self._close(COMPLETED)
        item["status"] = IN_PROGRESS
        self._open = item["type"]
        self.items.append(item)
        self._tell("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def _close(self, status: str) -> None:
        """End the open item, with all of its text in its place."""
        text, self._texts = "".join(self._texts), []
        item, place = self.items[-1], self._place()
        item["status"] = status
        if self._open == "function_call":
            item["arguments"] = text
            self._tell("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        elif self._open == "reasoning":
            item["content"] = [_thought_part(text)]
            self._tell("response.reasoning_text.done", **place, content_index=0, text=text)
            self._tell("response.content_part.done", **place, content_index=0, part=item["content"][0])
        else:
            item["content"] = [_text_part(text, self._logprobs)]
            self._tell("response.output_text.done", **place, content_index=0, text=text, logprobs=self._logprobs)
            self._tell("response.content_part.done", **place, content_index=0, part=item["content"][0])
            self._logprobs = []
        self._tell("response.output_item.done", output_index=len(self.items) - 1, item=item)
        self._open = ""

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
