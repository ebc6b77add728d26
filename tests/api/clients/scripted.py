"""A server behind a real socket whose answers a test writes: what no model of a few kilobytes would say by itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from server.app import create_app
from server.config import Settings
from server.errors import ServingError
from server.messages import Delta, Submit
from server.metrics import Metrics
from server.prompt import Scribe
from tests.api.clients.polite import CONTEXT
from tests.api.fake_engine import FakeEngine, ready
from tests.api.house import say
from tests.api.model_folder import END, make_folder

KEY = "a-key"
START_S = 30.0


@dataclass
class Scripted:
    """The running server. Owns the engine's script, which a test sets, and the count of refusals."""

    url: str
    engine: FakeEngine
    scribe: Scribe
    num_refused: int = 0

    def answer(self, text: str) -> None:
        """Whatever is asked."""
        self.engine.script = say(text)

    def answer_in_turn(self, *texts: str) -> None:
        """One text a request, the last one again and again."""
        waiting = list(texts)
        self.engine.script = lambda submit: [*(waiting.pop(0) if len(waiting) > 1 else waiting[0]).encode(), END]

    def answer_by_prompt(self, choose: Callable[[str], str]) -> None:
        """What `choose` says to the prompt as the model reads it."""
        self.engine.script = lambda submit: [*choose(self._read(submit)).encode(), END]

    def refuse(self, error: ServingError, times: int) -> None:
        """So many requests; those behind them are answered."""
        self.num_refused = 0
        plain = type(self.engine).stream

        def stream(submit: Submit) -> AsyncIterator[Delta]:
            is_refused = self.num_refused < times
            self.num_refused += is_refused
            self.engine.refusal = error if is_refused else None
            return plain(self.engine, submit)

        self.engine.stream = stream  # type: ignore[method-assign]

    def prompts(self) -> list[str]:
        """What the model read since the test began."""
        return [self._read(submit) for submit in self.engine.submits]

    def _read(self, submit: Submit) -> str:
        return self.scribe.text.read_prompt(submit.prompt)

    def clear(self) -> None:
        """As when the server began."""
        vars(self.engine).pop("stream", None)
        vars(self.engine).update(vars(fresh_engine()))


def fresh_engine() -> FakeEngine:
    engine = FakeEngine(say("Okay."))
    return replace(engine, info=ready(max_model_len=CONTEXT))


@contextmanager
def scripted_server(folder: Path, template: str) -> Iterator[Scripted]:
    """A server in a thread of this process."""
    make_folder(folder, template=template)
    engine = fresh_engine()
    settings = Settings(model=str(folder), served_model_name=("m", "also-m"), api_key=(KEY,))
    scribe = Scribe(settings)
    app = create_app(engine, scribe, Metrics(), settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        ends_at = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < ends_at
            time.sleep(0.01)
        try:
            yield Scripted(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, scribe)
        finally:
            server.should_exit = True
            thread.join(START_S)
            scribe.close()
