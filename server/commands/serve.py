"""`foretoken serve`: from Settings to a running server, and from a signal back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from server import default_model
from server.app import create_app
from server.config import Settings, SettingsError, overruled_port
from server.demo import is_demo
from server.engine import Engine
from server.errors import StartupError
from server.gguf import resolve
from server.messages import Ready
from server.metrics import Metrics
from server.model_files import served_names
from server.prompt import Scribe
from server.worker_process import WorkerProcess

MAX_HEADER_BYTES = 64 * 2**10
"""Request line and headers of one request; more is refused by the HTTP parser."""

LAST_BYTES_S = 5.0
"""How long an ended answer may take to reach a slow client once everything else has stopped."""

GIVEN_UP_S = 5.0
"""How long a server without hope of a worker still says so: clients read errors, scrapes see the last counts."""

log = logging.getLogger("foretoken")


def serve(settings: Settings, worker: WorkerProcess | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. `worker` is one that was started, and told nothing yet.

    Raises StartupError with one line when the address is taken or the model cannot be served.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("uvicorn", "httpx", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.DEBUG if settings.log_level == "debug" else logging.WARNING)
    if note := default_model.note(settings.model):
        log.info("%s", note)
    listener = bind(settings.host, settings.port)
    try:
        if not settings.api_key and not is_loopback(listener):
            log.warning("no --api-key, and %s is no loopback address: whoever reaches it is served", settings.host)
        if told := overruled_port(settings, os.environ):
            log.warning(
                "--port %d wins over FORETOKEN_PORT=%s: what asks the port in the variable, such as a health check, "
                "finds nobody",
                settings.port,
                told,
            )
        with told_address(settings.address_file, listener):
            try:
                with _stopped_by_a_signal():
                    settings = replace(settings, model=resolve(settings.model, log.info))
            except KeyboardInterrupt:
                if worker is not None:
                    worker.close()
                return 0
            return asyncio.run(House(settings, listener, worker).run())
    finally:
        listener.close()


@contextlib.contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt too: the first process of a container would not hear it otherwise."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def told_address(file: str, listener: socket.socket) -> Iterator[None]:
    """Keep the address that a program of this machine connects to in `file`, if it has a name."""
    if not file:
        yield
        return
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    told = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        Path(file).write_text(told, encoding="utf-8")
    except OSError as error:  # a help for health checks is no reason not to serve
        log.warning("--address-file %s: cannot be written: %s", file, error.strerror or error)
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if Path(file).read_text(encoding="utf-8") == told:  # another server may have written its own by now
                Path(file).unlink()


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket, taken before the model is loaded so that a taken port is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise SettingsError(f"--host {host}: not an address of this machine ({error})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            line = f"port {port} on {host} is in use: pass another one with --port (0 lets the system choose)"
        else:
            line = f"cannot listen on {host} port {port}: {error.strerror}"
        raise SettingsError(line) from error
    listener.setblocking(False)
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs of this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """The base URL that clients use, with the port the system really gave."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def numbers_of(ready: Ready) -> str:
    """The type that the model computes in, where, and what that means for the promise that speculation is invisible."""
    if ready.is_row_invariant:
        return f"{ready.dtype} on {ready.device}"
    if ready.dtype != "float32":
        return f"{ready.dtype} on {ready.device}: answers may differ at near-ties"
    # On a GPU nobody has measured it yet.
    return f"float32 on {ready.device}{'' if ready.device == 'cpu' else ': not measured whether answers may differ'}"


async def _scribe(settings: Settings) -> Scribe:
    """Read what prompts need. Given up when cancelled, also in the middle of a download that has no end."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[Scribe] = loop.create_future()

    def tell(scribe: Scribe | None, error: BaseException | None) -> None:
        if made.done():
            return
        if scribe is not None:
            made.set_result(scribe)
        elif error is not None:
            made.set_exception(error)

    def make() -> None:
        scribe, error = None, None
        try:
            scribe = Scribe(settings)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, scribe, error)

    # Not a thread of the loop's pool, for which the interpreter waits at its end.
    threading.Thread(target=make, name="scribe", daemon=True).start()
    scribe = await made
    try:
        await scribe.start()
    except BaseException:
        scribe.close()
        raise
    return scribe


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: the house decides what a signal means."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class House:
    """One running server. Owns the worker, the engine, the HTTP server and what a signal does."""

    def __init__(self, settings: Settings, listener: socket.socket, worker: WorkerProcess | None = None):
        self._settings = settings
        self._worker = worker
        self._listener = listener
        self._num_signals = 0
        self._told_to_stop = asyncio.Event()
        self._told_to_quit = asyncio.Event()

    async def run(self) -> int:
        """Load, serve, drain, leave; returns the exit code: 1 if answers were cut off or the worker was given up."""
        settings = self._settings
        metrics = Metrics()
        engine = Engine(settings, metrics.observe_step, metrics.worker_ready, reserve=self._worker)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await engine.start()  # the worker loads while the tokenizer is read
        try:
            scribe = await self._read_tokenizer(engine)
        except BaseException:
            await engine.close()
            raise
        if scribe is None:
            await engine.close()
            return 0
        engine.vocabulary = scribe.vocabulary
        http = _Http(self._http_config(create_app(engine, scribe, metrics, settings)))
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        try:
            await self._until_stop(engine, serving)
            has_failed = engine.is_dead or self._told_to_quit.is_set()
        finally:
            num_cut = engine.num_running + engine.num_waiting
            if num_cut:
                log.warning("%d answers are cut off: they end in an error", num_cut)
            scribe.close()  # what is still being rendered, and may be so for ever, would not be admitted any more
            await engine.close()
            http.should_exit = True
            http.force_exit = self._told_to_quit.is_set()
            await serving
        return 1 if has_failed or num_cut else 0

    async def _read_tokenizer(self, engine: Engine) -> Scribe | None:
        """What prompts need, or None if a signal came first. Raises StartupError if there is no hope of a worker."""
        reading = asyncio.create_task(_scribe(self._settings))
        stop = asyncio.create_task(self._told_to_stop.wait())
        dying = asyncio.create_task(engine.wait_dead())
        try:
            await asyncio.wait({reading, stop, dying}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
            if dying.done():
                raise StartupError(dying.result())
            return None
        finally:
            for task in (reading, stop, dying):
                task.cancel()
            await asyncio.gather(reading, stop, dying, return_exceptions=True)

    def _http_config(self, app: FastAPI) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http="h11",  # it bounds the header; httptools is 2 microseconds a chunk faster and does not
            lifespan="off",
            ws="none",
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=int(LAST_BYTES_S),
            timeout_keep_alive=self._settings.idle_connection_s,
        )

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._told_to_stop.set()
        if self._num_signals > 1:
            self._told_to_quit.set()

    async def _until_stop(self, engine: Engine, serving: asyncio.Task[None]) -> None:
        """Start the engine, say when it is ready, wait for a signal or the worker's end, let running answers end."""
        stop = asyncio.create_task(self._told_to_stop.wait())
        starting = asyncio.create_task(self._start(engine))
        dying = asyncio.create_task(engine.wait_dead())
        try:
            await asyncio.wait({stop, starting, serving}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await asyncio.wait({stop, serving, dying}, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                log.error("no worker is left, the server ends: %s", dying.result())
                await asyncio.wait({stop, serving}, timeout=GIVEN_UP_S, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                raise StartupError("the HTTP server ended by itself")
            if engine.info is not None and not engine.is_dead:  # a worker that is being replaced will go on with them
                await self._drain(engine)
        finally:
            for task in (stop, starting, dying):
                task.cancel()
            await asyncio.gather(stop, starting, dying, return_exceptions=True)

    async def _start(self, engine: Engine) -> None:
        await engine.wait_ready()
        info = engine.info
        assert info is not None, "a ready engine knows its worker"
        settings = self._settings
        model = served_names(settings)[0] + (", a toy" if is_demo(settings.model) else "")
        print(
            f"foretoken: ready at {url_of(self._listener)} ({model}, {numbers_of(info)}, "
            f"context {info.max_model_len}, drafter {settings.drafter})",
            flush=True,
        )

    async def _drain(self, engine: Engine) -> None:
        num_open = engine.num_running + engine.num_waiting
        log.info("draining: %d open answers, at most %g s", num_open, self._settings.drain_timeout_s)
        drain = asyncio.create_task(engine.drain(self._settings.drain_timeout_s))
        quit_now = asyncio.create_task(self._told_to_quit.wait())
        await asyncio.wait({drain, quit_now}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drain, quit_now):
            task.cancel()
        results = await asyncio.gather(drain, quit_now, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]
