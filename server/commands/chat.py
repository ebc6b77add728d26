"""`foretoken chat`: a terminal conversation with any OpenAI-compatible server, and what speculation did for it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import Any, TextIO

import httpx

from server.commands.first_model import first_model
from server.config import SettingsError

HELP = "/reset forgets the conversation, /quit leaves, ctrl-c stops an answer"

_UNSEEN = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})
"""Control characters, left out on a screen: what a model says must not move the cursor or retitle the window."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `foretoken chat`."""
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server [%(default)s]")
    add("--model", default="", help="model name [the first one the server lists]")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="key to send [$OPENAI_API_KEY]")
    add("--system", default="", help="system message")
    add("--max-tokens", type=int, default=None, help="tokens of one answer at most [the rest of the context]")
    add("--temperature", type=float, default=None, help="[the server's]")
    add("--seed", type=int, default=None, help="seed of every answer [random]")
    add("--no-speculation", action="store_true", help="plain decoding, to compare")
    add("--plain", action="store_true", help="send no `speculative` field: for servers that do not know it")


def run(arguments: argparse.Namespace) -> int:
    """Talk until /quit or the end of the input; 1 if an answer failed and nobody was there to see it."""
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise SettingsError(f"--max-tokens: must be at least 1, got {arguments.max_tokens}")
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    timeout = httpx.Timeout(30.0, read=600.0)
    try:
        client = httpx.Client(base_url=arguments.url.rstrip("/") + "/", headers=headers, timeout=timeout)
    except (httpx.InvalidURL, ValueError) as error:
        raise SettingsError(f"--url {arguments.url}: {error}") from error
    with client:
        model = arguments.model or first_model(arguments.url, arguments.api_key)
        fields = _fields(arguments, model)
        conversation = Conversation(client, fields, arguments.system)
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is not text is told of, line by line
        return Terminal(conversation, sys.stdin, sys.stdout, sys.stderr).run()


def _fields(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    optional = {
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "max_tokens": arguments.max_tokens,
    }
    fields.update({name: value for name, value in optional.items() if value is not None})
    if arguments.no_speculation:
        fields["speculative"] = {"enabled": False}
    elif not arguments.plain:
        fields["speculative"] = {"metrics": True}
    return fields


class ChatError(Exception):
    """The server could not answer; the message is for the person at the terminal."""


@dataclass(slots=True)
class AnswerStats:
    """What one answer took. Times are seconds since the request was sent."""

    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    speculation: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """One line for the person at the terminal."""
        parts = [f"{self.num_tokens} tokens"]
        if self.num_tokens > 1 and self.last_s > self.first_s:
            parts.append(f"{(self.num_tokens - 1) / (self.last_s - self.first_s):.1f} tokens/s")
        parts.append(f"first after {self.first_s * 1e3:.0f} ms")
        if (length := self.speculation.get("mean_acceptance_length")) is not None:
            parts.append(f"acceptance length {length:.2f}")
        return f"[{', '.join(parts)}]"


class Conversation:
    """One dialogue with one server. Owns its messages."""

    def __init__(self, client: httpx.Client, fields: dict[str, Any], system: str = "") -> None:
        self._client = client
        self._fields = fields
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.stats = AnswerStats()
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`. What was heard stays in the dialogue even when the caller stops early.

        Raises ChatError; the failed turn is then taken out again.
        """
        self.messages.append({"role": "user", "content": text})
        self.stats = AnswerStats()
        heard: list[str] = []
        try:
            for piece in self._stream():
                heard.append(piece)
                yield piece
        except (ChatError, httpx.HTTPError, ValueError) as error:
            self.messages.pop()
            raise error if isinstance(error, ChatError) else ChatError(f"{type(error).__name__}: {error}") from error
        finally:
            if heard and self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": "".join(heard)})

    def _stream(self) -> Iterator[str]:
        begin = time.perf_counter()
        body = {**self._fields, "messages": self.messages}
        with self._client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ChatError(_error_text(response))
            for line in response.iter_lines():
                if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                    continue
                event = json.loads(line[5:])
                if event.get("error"):
                    raise ChatError(str(event["error"].get("message", event["error"])))
                piece = self._take(event, time.perf_counter() - begin)
                if piece:
                    yield piece

    def _take(self, event: dict[str, Any], now: float) -> str:
        stats = self.stats
        if event.get("usage"):
            stats.num_tokens = event["usage"].get("completion_tokens", 0)
        stats.speculation = (event.get("metrics") or {}).get("speculative_decoding") or stats.speculation
        piece = "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices", []))
        if piece:
            stats.last_s = now
            stats.first_s = stats.first_s or now
        return piece


def _error_text(response: httpx.Response) -> str:
    response.read()
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {response.status_code}: {response.text[:300]}"


class Terminal:
    """The person's side: reads lines, prints answers; statistics go to `notes` so that output can be piped."""

    def __init__(self, conversation: Conversation, source: TextIO, answers: TextIO, notes: TextIO) -> None:
        self._conversation = conversation
        self._source = source
        self._answers = answers
        self._notes = notes
        self._is_person = source.isatty()
        self._is_screen = answers.isatty()

    def run(self) -> int:
        """Until /quit or the end of the input; the exit code."""
        code = 0
        if self._is_person:
            self._note(HELP)
        while (text := self._read()) is not None and text != "/quit":
            if text == "/reset":
                self._conversation.reset()
            elif text.startswith("/") and " " not in text and self._is_person:
                self._note(HELP)
            elif text:
                code = max(code, self._answer(text))
        return 0 if self._is_person else code

    def _read(self) -> str | None:
        if self._is_person:
            try:
                return self._readable(input("> ").strip())  # input() gives line editing where the terminal has it
            except (EOFError, KeyboardInterrupt):
                self._note("")
                return None
        line = self._source.readline()
        return self._readable(line.strip()) if line else None

    def _readable(self, line: str) -> str:
        """`line` without the bytes that are no text in the input's encoding."""
        try:
            line.encode()
        except UnicodeEncodeError:
            self._note("this line holds bytes that are not text; each is sent as the replacement character")
            return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return line

    def _answer(self, text: str) -> int:
        pieces = self._conversation.ask(text)
        try:
            for piece in pieces:
                self._answers.write(piece.translate(_UNSEEN) if self._is_screen else piece)
                self._answers.flush()
        except KeyboardInterrupt:
            if not self._is_person:
                raise
            self._note("\n[stopped]")
            return 0
        except ChatError as error:
            self._note(f"error: {error}")
            return 1
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator: ends the request when the person stopped it
        self._answers.write("\n")
        self._answers.flush()
        self._note(self._conversation.stats.line())
        return 0

    def _note(self, line: str) -> None:
        print(line, file=self._notes, flush=True)
