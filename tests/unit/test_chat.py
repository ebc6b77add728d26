from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.cli import main
from server.commands.chat import ChatError, Conversation, Terminal


def stream(*pieces: str, error: str = "") -> bytes:
    events: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    events += [{"choices": [{"delta": {"content": piece}}], "usage": None} for piece in pieces]
    if error:
        events.append({"error": {"message": error}})
    record = {"speculative_decoding": {"mean_acceptance_length": 2.345}}
    events.append({"choices": [], "usage": {"completion_tokens": 12}, "metrics": record})
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


class Server:
    """Plays a server. Owns the bodies it was sent."""

    def __init__(self, answer: Callable[[int], httpx.Response]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._answer = answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        return self._answer(len(self.bodies))

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self), base_url="http://test/v1/")


def talk(server: Server, typed: str) -> tuple[int, str, str]:
    with server.client() as client:
        answers, notes = io.StringIO(), io.StringIO()
        conversation = Conversation(client, {"model": "m", "stream": True}, "be kind")
        code = Terminal(conversation, io.StringIO(typed), answers, notes).run()
    return code, answers.getvalue(), notes.getvalue()


def test_piped_lines_are_turns_of_one_dialogue() -> None:
    server = Server(lambda number: httpx.Response(200, content=stream("An", f"swer {number}")))
    code, answers, notes = talk(server, "one\n\ntwo\n/reset\nthree\n/quit\nnever\n")
    assert (code, answers) == (0, "Answer 1\nAnswer 2\nAnswer 3\n")
    turns = [[message["content"] for message in body["messages"]] for body in server.bodies]
    assert turns == [["be kind", "one"], ["be kind", "one", "Answer 1", "two"], ["be kind", "three"]]
    assert notes.count("acceptance length 2.35") == 3
    assert "12 tokens" in notes


def test_bytes_that_are_no_text_are_told_and_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(lambda number: httpx.Response(200, content=stream("fine")))
    client = server.client()
    monkeypatch.setattr(httpx, "Client", lambda **_: client)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xff\nna\xc3\xafve\n"), "utf-8"))
    assert main(["chat", "--model", "m"]) == 0
    assert [body["messages"][-1]["content"] for body in server.bodies] == ["caf\ufffd \ufffd", "na\xefve"]
    told = capsys.readouterr()
    assert told.out == "fine\nfine\n"
    assert told.err.count("bytes that are not text") == 1


@pytest.mark.parametrize("count", ["0", "-1"])
def test_an_answer_has_at_least_one_token(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--max-tokens", count]) == 2
    assert capsys.readouterr().err.endswith(f"--max-tokens: must be at least 1, got {count}\n")


@pytest.mark.parametrize(
    "bad",
    [
        httpx.Response(400, json={"error": {"message": "too long"}}),
        httpx.Response(200, content=stream("half", error="too long")),
    ],
)
def test_a_failed_turn_is_told_and_forgotten(bad: httpx.Response) -> None:
    server = Server(lambda number: bad if number == 1 else httpx.Response(200, content=stream("fine")))
    code, answers, notes = talk(server, "one\ntwo\n")
    assert code == 1
    assert answers.endswith("fine\n")
    assert "error: too long" in notes
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["be kind", "two"]


def test_a_stopped_answer_stays_in_the_dialogue() -> None:
    server = Server(lambda number: httpx.Response(200, content=stream("one ", "two ", "three")))
    with server.client() as client:
        conversation = Conversation(client, {})
        pieces = conversation.ask("count")
        assert [next(pieces), next(pieces)] == ["one ", "two "]
        pieces.close()
    assert [message["content"] for message in conversation.messages] == ["count", "one two "]


def test_a_server_that_is_gone_is_an_error_of_the_turn() -> None:
    def gone(number: int) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with Server(gone).client() as client:
        conversation = Conversation(client, {})
        with pytest.raises(ChatError, match="ConnectError: refused"):
            list(conversation.ask("hello"))
        assert conversation.messages == []


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answers", "shown"), [(Screen(), "a]0;x[2Jb\tc\nd\n"), (io.StringIO(), None)])
def test_a_model_cannot_command_the_screen(answers: io.StringIO, shown: str | None) -> None:
    said = "a\x1b]0;x\x07\x9b[2J\r\x7f\x00b\tc\nd"
    with Server(lambda number: httpx.Response(200, content=stream(said))).client() as client:
        Terminal(Conversation(client, {"model": "m"}), io.StringIO("one\n"), answers, io.StringIO()).run()
    assert answers.getvalue() == (said + "\n" if shown is None else shown)
