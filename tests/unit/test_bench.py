from __future__ import annotations

import asyncio
import gzip
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli import main
from server.commands.bench import Bench, BenchOptions
from server.commands.bench_http import Answer, Body, SpeculativeDecoding, Target, post_stream
from server.commands.bench_prompts import Prompt, read_prompts
from server.commands.bench_report import Round, acceptance_length, ratios, report, same_texts, to_json_line
from server.commands.first_model import wait_until_it_drafts
from server.config import SettingsError


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\r\n\r\n"


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SPECULATION = {
    "num_spec_steps": 2,
    "num_accepted_draft_tokens": 3,
    "num_draft_tokens": 8,
    "mean_acceptance_length": 2.5,
}
STREAM = b"".join(
    [
        event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}),
        b": ping\r\n\r\n",
        event({"choices": [{"index": 0, "delta": {"content": "Grüße"}}], "usage": None}),
        event({"choices": [{"index": 0, "delta": {"content": " 世界"}}]}),
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        event(
            {
                "choices": [],
                "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
                "metrics": {"speculative_decoding": SPECULATION},
            }
        ),
        b"data: [DONE]\r\n\r\n",
    ]
)


class FakeServer:
    """Answers every POST with given bytes, in given pieces. Owns the list of request bodies."""

    def __init__(self, reply: bytes, piece: int = 1 << 20) -> None:
        self.reply = reply
        self.piece = piece
        self.bodies: list[dict[str, Any]] = []
        self.open = 0
        self.most_open = 0

    async def __aenter__(self) -> Target:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return Target("127.0.0.1", self._server.sockets[0].getsockname()[1], "/v1", is_tls=False, api_key="k")

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"Authorization: Bearer k\r\n" in head
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        for start in range(0, len(self.reply), self.piece):
            writer.write(self.reply[start : start + self.piece])
            await asyncio.sleep(0)
        await writer.drain()
        self.open -= 1
        writer.close()


def ask(reply: bytes, piece: int = 1 << 20, timeout_s: float = 10.0) -> Answer:
    async def go() -> Answer:
        async with FakeServer(reply, piece) as target:
            return await post_stream(target, "/chat/completions", b"{}", timeout_s)

    return asyncio.run(go())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_a_body_is_the_same_however_it_is_cut(size: int) -> None:
    for chunk in (1, 5, 33, 10_000):
        wire = HEAD + chunked(STREAM, chunk)
        body = Body()
        lines = [line for start in range(0, len(wire), size) for line in body.feed(wire[start : start + size])]
        assert b"\r\n".join(lines) + b"\r\n" == STREAM
        assert body.is_over
        assert body.status == 200


def test_a_stream_becomes_an_answer() -> None:
    answer = ask(HEAD + chunked(STREAM, 50), piece=11)
    assert answer.error == ""
    assert answer.text == "Grüße 世界"
    assert (answer.num_prompt, answer.num_completion, answer.num_chunks) == (7, 5, 2)
    assert answer.speculation == SpeculativeDecoding(2, 3, 8)
    assert 0 < answer.first_s <= answer.last_s
    assert answer.tpot_s == pytest.approx((answer.last_s - answer.first_s) / 4)


def test_completions_and_bodies_without_chunks_are_read_too() -> None:
    body = event({"choices": [{"text": "a"}]}) + event({"choices": [{"text": "b"}]}) + b"data: [DONE]\n\n"
    answer = ask(b"HTTP/1.1 200 OK\r\n\r\n" + body)
    assert (answer.text, answer.error) == ("ab", "")


def test_failures_are_told_not_raised() -> None:
    refused = b'HTTP/1.1 404 Not Found\r\ncontent-length: 27\r\n\r\n{"error":{"message":"none"}}'
    assert ask(refused).error == 'status 404: {"error":{"message":"none"}}'
    cut = HEAD + chunked(STREAM.replace(b"data: [DONE]\r\n\r\n", b""), 50)
    assert ask(cut).error == "the stream broke off before [DONE]"
    failing = event({"choices": [{"text": "a"}]}) + event({"error": {"message": "boom"}}) + b"data: [DONE]\n\n"
    assert "boom" in ask(b"HTTP/1.1 200 OK\r\n\r\n" + failing).error
    assert "MsgspecError" in ask(b"HTTP/1.1 200 OK\r\n\r\ndata: {broken\n\n").error or "DecodeError" in (
        ask(b"HTTP/1.1 200 OK\r\n\r\ndata: {broken\n\n").error
    )
    assert ask(b"gibberish\r\n\r\n").error

    async def nobody_there() -> Answer:
        async with FakeServer(b"") as target:
            pass
        return await post_stream(target, "/completions", b"{}", 5)

    assert "ConnectionRefused" in asyncio.run(nobody_there()).error


def test_a_silent_server_is_not_waited_for_forever() -> None:
    async def go() -> Answer:
        release = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await release.wait()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        answer = await post_stream(Target("127.0.0.1", port, "", is_tls=False), "/x", b"{}", 0.05)
        release.set()
        server.close()
        await server.wait_closed()
        return answer

    assert asyncio.run(go()).error == "no end of the answer within 0.05 s"


def test_urls_are_taken_apart() -> None:
    assert Target.parse("http://[::1]:81/v1/") == Target("::1", 81, "/v1", is_tls=False)
    assert Target.parse("https://host/v1", "k") == Target("host", 443, "/v1", is_tls=True, api_key="k")
    for url in ("localhost:8000", "ftp://x/v1", "http://", "http://h:port/v1"):
        with pytest.raises(SettingsError, match="--url"):
            Target.parse(url)


ROWS = [
    {"prompt": "Once"},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]},
    {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
    {"question_id": 1, "turns": ["first", "second"]},
    {"question": "Why?", "answer": "42"},
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_prompt_files_of_every_shape(tmp_path: Path, suffix: str) -> None:
    data = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    packers = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    file = tmp_path / f"p.jsonl{suffix}"
    file.write_bytes(packers[suffix](data))
    prompts = read_prompts(str(file))
    assert prompts == [
        Prompt((), "Once"),
        Prompt((("system", "S"), ("user", "U")), ""),
        Prompt((("user", "U"),), ""),
        Prompt((("user", "first"),), ""),
        Prompt((("user", "Why?"),), ""),
    ]
    assert [prompt.endpoint for prompt in prompts] == ["completions", "chat", "chat", "chat", "chat"]
    assert {prompt.endpoint for prompt in read_prompts(str(file), "chat")} == {"chat"}
    assert [prompt.text for prompt in read_prompts(str(file), "completions", cut_chars=3)] == [
        "Onc", "S\nU", "U", "fir", "Why",
    ]  # fmt: skip


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\n\ntwo words\n")
    assert [prompt.text for prompt in read_prompts(str(file))] == ["one", "two words"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{', r"p\.jsonl:2: not JSON"),
        ("[1]", r"p\.jsonl:1: expected an object with prompt"),
        ('{"prompt": 1}', r"p\.jsonl:1: expected an object"),
        ("\n", "no prompts in it"),
    ],
)
def test_a_wrong_prompt_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_prompts(str(file))
    with pytest.raises(SettingsError, match="No such file"):
        read_prompts(str(tmp_path / "absent.jsonl"))


def test_a_salt_goes_in_front_and_nothing_else_changes() -> None:
    assert Prompt((), "b").body("a ") == {"prompt": "a b"}
    messages = Prompt((("user", "x"), ("assistant", "y")), "").body("a ")["messages"]
    assert [message["content"] for message in messages] == ["a x", "y"]


def answered(text: str, num_tokens: int, *, error: str = "", speculation: tuple[int, int] | None = None) -> Answer:
    record = None if speculation is None else SpeculativeDecoding(speculation[0], speculation[1], 99)
    return Answer(
        text=text,
        num_completion=num_tokens,
        num_chunks=max(num_tokens, 1),
        first_s=0.1,
        last_s=0.5,
        error=error,
        speculation=record,
    )


def rounds_of(arm: str, walls: Sequence[float], concurrency: int = 1, **answer: Any) -> list[Round]:
    return [
        Round(concurrency, arm, number, wall, (answered("t", 5, **answer), answered("u", 15, **answer)))
        for number, wall in enumerate(walls)
    ]


def test_the_report_takes_medians_and_pairs_rounds() -> None:
    rounds = [
        *rounds_of("off", [2.0, 4.0, 2.0]),
        *rounds_of("on", [1.0, 1.0, 1.0], speculation=(4, 6)),
        *rounds_of("off", [1.0], concurrency=8, error="status 500"),
    ]
    assert ratios([r for r in rounds if r.concurrency == 1], "on", "off") == {"median": 2.0, "rounds": [2.0, 4.0, 2.0]}
    text, record = report(rounds, {"model": "m"})
    on = next(row for row in record["results"] if row["arm"] == "on")
    assert on["acceptance_length"] == 2.5
    assert on["tokens_per_s"] == 20.0
    assert on["ttft_ms"] == 100.0
    assert on["tpot_ms"] == pytest.approx((100 + 0.4 / 14 * 1e3) / 2, abs=1e-3)
    assert record["ratio"]["1"]["median"] == 2.0
    assert record["ratio"]["8"]["median"] is None
    assert "2.00x tokens/s" in text
    assert "failed 2 times: status 500" in text
    assert (record["same_texts"], record["compared_texts"]) == (6, 6)
    assert json.loads(to_json_line(record)) == record


def test_acceptance_counts_steps_not_requests() -> None:
    answers = [answered("a", 1, speculation=(1, 0)), answered("b", 1, speculation=(9, 18)), answered("c", 1)]
    assert acceptance_length(answers) == pytest.approx(2.8)
    assert acceptance_length(answers[2:]) is None


def test_a_text_that_differs_between_arms_is_seen() -> None:
    one = Round(1, "on", 0, 1.0, (answered("same", 1), answered("left", 1)))
    two = Round(1, "off", 0, 1.0, (answered("same", 1), answered("right", 1)))
    assert same_texts([one, two]) == (1, 2)


def options(**changes: Any) -> BenchOptions:
    values: dict[str, Any] = {
        "model": "m", "concurrency": (1, 4), "arms": ("on", "off"), "rounds": 2, "num_warmup": 1, "per_round": 5,
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 100, "ignore_eos": True, "salt": False,
        "timeout_s": 10.0, "drafter": "trigram", "max_nodes": 8,
    }  # fmt: skip
    return BenchOptions(**{**values, **changes})


def test_both_arms_send_the_same_and_every_round_its_own_prompts() -> None:
    fake = FakeServer(HEAD + chunked(STREAM, 1000))
    prompts = [Prompt((), f"p{index}") for index in range(30)]

    async def go() -> list[Round]:
        async with fake as target:
            return await Bench(target, options(), prompts, lambda line: None).run()

    rounds = asyncio.run(go())
    assert [(r.concurrency, r.arm, r.number) for r in rounds] == [
        (1, "on", 0), (1, "off", 0), (4, "on", 0), (4, "off", 0),
        (1, "off", 1), (1, "on", 1), (4, "off", 1), (4, "on", 1),
    ]  # fmt: skip
    assert all(len(one.answers) == 5 and not any(a.error for a in one.answers) for one in rounds)
    assert 2 <= fake.most_open <= 4
    by_arm: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for body in fake.bodies:
        by_arm[body.pop("speculative")["enabled"]].append(body)

    def by_prompt(body: dict[str, Any]) -> str:
        return str(body["prompt"])

    assert sorted(by_arm[True], key=by_prompt) == sorted(by_arm[False], key=by_prompt)
    asked = [body["prompt"] for body in by_arm[True]]
    assert len(set(asked)) == len(asked) == 21
    assert by_arm[True][3]["seed"] == 100 + int(by_arm[True][3]["prompt"][1:])


def test_the_on_arm_names_drafter_and_nodes_and_plain_sends_nothing_of_ours() -> None:
    bench = Bench(Target("h", 1, "", is_tls=False), options(salt=True), [Prompt((), "p")], lambda line: None)
    body = json.loads(bench._request(0, "on")[1])
    assert body["speculative"] == {"enabled": True, "metrics": True, "drafter": "trigram", "max_nodes": 8}
    assert body["prompt"].endswith(" p")
    assert len(body["prompt"]) == 10
    assert "speculative" not in json.loads(bench._request(0, "plain")[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds: must be at least 1"),
        (["--concurrency", "0"], "--concurrency: must be at least 1"),
        (
            ["--concurrency", "9", "--warmup", "0"],
            "--concurrency: 9 needs as many prompts in a round, there are 5 (of 20 in the file, --warmup takes 0)",
        ),
        ([], "20 prompts are too few, 72 are needed"),
        (["--arms", "on", "on"], "--arms: each arm once"),
        (["--url", "nowhere"], "--url nowhere"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("".join(f"prompt {index}\n" for index in range(20)))
    extra = [] if words else ["--num-prompts", "8"]
    assert main(["bench", "--prompts", str(file), *extra, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_table_and_a_last_json_line_and_fails_with_its_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("".join(f"prompt {index}\n" for index in range(20)))

    async def go(reply: bytes) -> int:
        async with FakeServer(reply) as target:
            words = ["bench", "--url", f"http://{target.host}:{target.port}/v1", "--model", "m", "--api-key", "k"]
            words += ["--prompts", str(file), "--concurrency", "2", "--rounds", "1", "--num-prompts", "3"]
            return await asyncio.to_thread(main, [*words, "--save", str(tmp_path / "out.json")])

    assert asyncio.run(go(HEAD + chunked(STREAM, 99))) == 0
    told = capsys.readouterr()
    assert told.err.startswith(
        "prompts: 20 in the file, 8 for the warm-up, 3 counted (3 in each of 1 rounds x 1 concurrencies), 9 unused\n"
    )
    out = told.out.splitlines()
    assert "acceptance length" in out[0]
    record = json.loads(out[-1])
    assert record["results"][0]["completion_tokens"] == 15
    assert json.loads((tmp_path / "out.json").read_text())["detail"][0]["answers"][0]["completion_tokens"] == 5
    assert asyncio.run(go(b"HTTP/1.1 500 Oops\r\n\r\nno")) == 2
    assert "warm-up, on: no request was answered: status 500: no" in capsys.readouterr().err


def test_a_record_that_cannot_be_kept_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("Hello\n" * 50)
    words = ["bench", "--url", "http://127.0.0.1:9/v1", "--prompts", str(prompts), "--save", str(tmp_path / "no" / "x")]
    assert main(words) == 2
    assert "--save" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "num_asked", "is_told"),
    [
        ([{"status": "ok", "drafting": False}] * 2 + [{"status": "ok", "drafting": True}], 3, True),
        ([{"status": "ok", "drafting": True}], 1, False),
        ([{"status": "ok", "drafting": None}], 1, False),
        ([["another server"]], 1, False),
        ([httpx.ConnectError("nobody")], 1, False),
    ],
)
def test_a_server_that_still_compiles_is_waited_for(
    answers: list[Any], num_asked: int, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    told: list[str] = []

    def get(url: str, **_: object) -> httpx.Response:
        asked.append(url)
        answer = answers[len(asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, json=answer)

    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setattr("time.sleep", lambda _: None)
    wait_until_it_drafts("http://localhost:1/v1/", told.append)
    assert asked == ["http://localhost:1/health"] * num_asked
    assert bool(told) == is_told
