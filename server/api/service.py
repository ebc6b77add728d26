"""What every route needs: the gate, the scribe, the metrics, the settings."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from server.api.fields import MAX_PATH
from server.config import Settings
from server.errors import EngineUnavailable, ModelNotFound
from server.messages import Delta, Ready, Submit
from server.metrics import Metrics
from server.prompt import Scribe

LOADING_RETRY_S = 2.0


class Gate(Protocol):
    """What the HTTP side asks of the engine."""

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted now, queue permitting."""

    @property
    def has_worker(self) -> bool:
        """Whether a worker has loaded and lives, even if nothing is admitted any more."""

    @property
    def is_drafting(self) -> bool:
        """Whether the worker's drafters draft."""

    @property
    def is_draining(self) -> bool:
        """Whether the server is going down and admits nothing more."""

    @property
    def is_dead(self) -> bool:
        """Whether the worker died too often to be started again."""

    @property
    def info(self) -> Ready | None:
        """What the worker said when it had loaded."""

    @property
    def num_running(self) -> int:
        """Requests that run."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""

    @property
    def num_restarts(self) -> int:
        """How often a dead worker was replaced."""

    def stream(self, submit: Submit) -> AsyncIterator[Delta]:
        """Run one request; closing the iterator aborts it. Raises ServingError."""


class SeedSource:
    """Seeds for requests that bring none. Owns its generator: of the server's seed, or of the system when that is 0."""

    def __init__(self, seed: int):
        self._random: random.Random = random.Random(seed) if seed else random.SystemRandom()

    def draw(self) -> int:
        """The next seed, in [0, 2**63)."""
        return self._random.getrandbits(63)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of `n` choices: the first keeps the request's own, the others get one that follows from it."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of the server that routes work with."""

    engine: Gate
    scribe: Scribe
    metrics: Metrics
    settings: Settings
    names: tuple[str, ...]
    """Served model names, the first is the one that answers carry."""
    seeds: SeedSource
    started_s: int
    """Unix time at which the app was made; the `created` of the model cards."""

    def check_model(self, name: str) -> None:
        """Raise ModelNotFound unless `name` is served."""
        if name not in self.names:
            raise ModelNotFound(
                f"The model `{name[:MAX_PATH]}` does not exist; this server has {', '.join(self.names)}.", param="model"
            )

    def worker(self) -> Ready:
        """What the worker said of itself. Raises EngineUnavailable while there is none to ask."""
        info = self.engine.info
        if info is None or not self.engine.is_ready:
            raise EngineUnavailable(why_not_ready(self.engine), retry_after_s=LOADING_RETRY_S)
        return info


def why_not_ready(engine: Gate) -> str:
    """One word group for readiness probes and 503 answers."""
    if engine.is_dead:
        return "the worker died too often and is not started again"
    if engine.is_draining:
        return "the server is draining"
    return "the model is loading"
