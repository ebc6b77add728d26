"""Entry of the worker process: `python -m server.worker.main FD`, where FD is an inherited stream socket.

The first frame in is the Settings, as a map; the answer is Ready or Refused. Then Submit, Abort and Shutdown come in
and Outcome goes out. Ping is answered between steps, by the thread that runs them: a side thread would hide a step that
hangs. A crash prints its traceback and exits non-zero; the API process decides what happens then.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from drafters import MASKS, OTHERS, PLAIN
from server.caution import DEVICE_LOST
from server.config import Settings
from server.errors import StartupError
from server.messages import Awake, Busy, Ping, Pong, Ready, Refused, Shutdown, ToWorker, Vocabulary
from server.worker.apart import is_device_fault
from server.worker.channel import Channel, ChannelClosed
from server.worker.drafting import Drafting
from server.worker.loading import DrafterNeeds, load_drafters, load_verifier, share_weights
from server.worker.loop import Judge, Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from server.worker.trials import try_all, try_target
from verifier.parent import die_with_parent

_PREPARE_S = 600.0
"""What is prepared while nobody waits may take so long in silence: compiling for a new size takes minutes at worst."""

_COMPILING_S = 0.005
"""How often an idle worker looks whether a grammar is compiled."""

logger = logging.getLogger(__name__)


class Geometry(Protocol):
    """What the worker must know of a loaded verifier."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def num_pages(self) -> int:
        """K/V pages, the trash page included."""

    @property
    def page_size(self) -> int:
        """Tokens per page."""

    @property
    def device(self) -> str:
        """Where the model runs."""

    @property
    def dtype(self) -> str:
        """Type of weights and K/V."""


class Turns(Protocol):
    """What is done between steps: see server.worker.waking.Waking."""

    @property
    def is_awake(self) -> bool:
        """Whether drafters draft."""

    @property
    def takes_long(self) -> bool:
        """Whether a turn of an idle worker may take minutes."""

    def __call__(self, is_idle: bool) -> bool:
        """Do a turn. Returns: whether to call again when idle."""


@dataclass(frozen=True, slots=True)
class Work:
    """A loaded worker."""

    loop: Loop
    ready: Ready
    waking: Turns | None = None
    """What is still to be done between steps."""


def load(settings: Settings) -> Work:
    """Load model and drafters and try the model. Raises: StartupError with one line if that can never succeed.

    On a CPU the rest is done while the worker serves; a device's kernels are compiled before.
    """
    from server.worker.kept_profile import KeptProfile
    from server.worker.waking import Waking, name_of_costs

    _check(settings)
    logger.debug("loading the model")
    verifier = load_verifier(settings)
    geometry = verifier.geometry
    needs = DrafterNeeds(
        settings, geometry.vocab_size, geometry.device, geometry.dtype, lambda: share_weights(verifier)
    )
    work = assemble(settings, verifier, geometry, needs)
    width = needs.shared_weights().hidden_size if settings.ctc_head else 1
    work.loop.drafting.is_asleep = True
    verifier.use_compiled(False)
    costs = name_of_costs(settings, verifier)
    waking = Waking(verifier, work.loop, KeptProfile(costs), width)
    if settings.wait_for_compile or geometry.device != "cpu":
        verifier.prepare_first()
        waking.load()
        try_all(work.loop, geometry.vocab_size)
        waking.measure()
    else:
        try_target(work.loop, geometry.vocab_size)
    # What is loaded now stays: the collector need not walk through all of it in the middle of a step.
    gc.collect()
    gc.freeze()
    ready = msgspec.structs.replace(
        work.ready,
        drafter_bytes=work.loop.drafting.sizes(),
        backend=verifier.name,
        is_row_invariant=verifier.is_row_invariant,
        is_awake=waking.is_awake,
    )
    return Work(work.loop, ready, waking)


def _check(settings: Settings) -> None:
    """Refuse before anything heavy is loaded."""
    if settings.max_num_seqs > settings.max_num_batched_tokens:
        raise StartupError(
            f"max_num_batched_tokens {settings.max_num_batched_tokens} is less than "
            f"max_num_seqs {settings.max_num_seqs}: every running request needs a position in each step"
        )
    known = (PLAIN, *MASKS, *OTHERS)
    if settings.drafter not in known:
        raise StartupError(f"--drafter: {settings.drafter} is not known; there are {', '.join(known)}")
    if settings.drafter == "ctc" and not settings.ctc_head:
        raise StartupError("--drafter ctc: it needs a head: pass --ctc-head FOLDER")
    if settings.ctc_head and not Path(settings.ctc_head).is_dir():
        raise StartupError(f"--ctc-head {settings.ctc_head}: no such folder; it takes the folder of a head's two files")
    if settings.trigram_table and not Path(settings.trigram_table).is_file():
        raise StartupError(f"--trigram-table {settings.trigram_table}: no such file")


def assemble(settings: Settings, verifier: Judge, geometry: Geometry, needs: DrafterNeeds | None = None) -> Work:
    """Put a loop together around a loaded verifier. Raises: StartupError.

    Without `needs` there are only drafters that need nothing of the target but its vocabulary.
    """
    limits = Limits(
        max_rows=settings.max_num_seqs,
        max_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=geometry.max_model_len,
        num_pages=geometry.num_pages,
        page_size=geometry.page_size,
        has_prefix_cache=settings.enable_prefix_caching,
    )
    drafters = load_drafters(needs or DrafterNeeds(settings, geometry.vocab_size))
    if settings.drafter not in (PLAIN, *drafters):
        raise StartupError(f"drafter {settings.drafter} needs a head: pass --ctc-head FOLDER")
    drafting = Drafting(
        drafters,
        max_rows=settings.max_num_seqs,
        vocab_size=geometry.vocab_size,
        is_checked=settings.log_level == "debug",
    )
    ready = Ready(
        max_model_len=limits.context_len,
        vocab_size=geometry.vocab_size,
        drafters=drafting.names,
        device=geometry.device,
        dtype=geometry.dtype,
        num_pages=geometry.num_pages - 1,
    )
    speculator = Speculator(drafting, limits.max_rows)
    return Work(Loop(verifier, Scheduler(limits), speculator, geometry.vocab_size), ready)


def serve(channel: Channel, load: Callable[[Settings], Work]) -> None:
    """Load, then take messages and run steps until Shutdown or until the API process is gone.

    Raises: ChannelClosed if that happens before there is anything to keep.
    """
    settings_frame, *early = channel.receive(is_waiting=True)
    settings = msgspec.msgpack.Decoder(Settings).decode(settings_frame)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        work = load(settings)
    except StartupError as error:
        channel.send(Refused(str(error), is_final=error.is_final))
        return
    except Exception as error:
        if is_device_fault(error):
            raise  # a more careful worker may do
        # Whatever a library finds wrong with a model folder must reach the user as a line, not as a trace.
        logger.debug("loading failed", exc_info=True)
        line = " ".join(str(error).split())
        hint = "--log-level debug shows the trace"
        channel.send(Refused(f"cannot load {settings.model}: {type(error).__name__}: {line} ({hint})", is_final=False))
        return
    channel.send(work.ready)
    # After a crash nothing is kept: what was learned may be what crashed.
    with contextlib.suppress(ChannelClosed):
        _run(channel, work, early)
    work.loop.drafting.save()


def _run(channel: Channel, work: Work, early: list[bytes]) -> None:
    """Steps until Shutdown; `early` came in together with the settings. Raises: ChannelClosed."""
    loop = work.loop
    decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
    loop.announce = lambda seconds: channel.send(Busy(seconds))
    bodies = early
    has_more = True
    while True:
        for body in bodies:
            message = decoder.decode(body)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Ping):
                channel.send(Pong())
            elif isinstance(message, Vocabulary):
                loop.grammars.learn(message)
            else:
                loop.handle(message)
        if loop.has_work:
            channel.send(loop.step())
        bodies = channel.receive(is_waiting=False)
        if bodies:
            continue
        has_more = _prepare(channel, work, has_more)
        if not has_more and not loop.has_work:
            bodies = channel.receive(is_waiting=True, most_s=_COMPILING_S if loop.grammars.num_pending else None)


def _prepare(channel: Channel, work: Work, has_more: bool) -> bool:
    """Prepare what is next; `has_more` is what the last call said. Returns: whether an idle worker shall call again.

    Beside steps little is prepared at a time, which the limit of a step covers.
    """
    waking, is_idle = work.waking, not work.loop.has_work
    if is_idle and (waking is None or waking.is_awake):
        work.loop.grammars.prepare()
    if waking is None:
        return False
    was_awake, is_long = waking.is_awake, has_more and is_idle and waking.takes_long
    if is_long:
        channel.send(Busy(_PREPARE_S))
    has_more = waking(is_idle)
    if is_long:
        channel.send(Pong())
    if waking.is_awake and not was_awake:
        channel.send(Awake())
    return has_more


def main(argv: list[str], load: Callable[[Settings], Work] = load) -> int:
    """Run the worker on the socket argv[0]; returns the exit code. `load` makes the work from the settings."""
    die_with_parent()  # the socket tells of a parent's death between steps, this also in the middle of one
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the API process, which drains first
    channel = Channel(socket.socket(fileno=int(argv[0])))
    try:
        serve(channel, load)
    except ChannelClosed:
        logger.info("the API process is gone")
    except Exception as error:
        if not is_device_fault(error):
            raise
        logger.exception("the device is lost")
        return DEVICE_LOST
    finally:
        channel.close()
    return 0


if __name__ == "__main__":
    # Here, and before anything is told: a process in reserve has it behind it, and tests with toy models do without.
    die_with_parent()
    importlib.import_module("server.worker.waking")
    importlib.import_module("verifier.load").build_ahead()
    sys.exit(main(sys.argv[1:]))
