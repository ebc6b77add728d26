"""Tells when a worker has been silent for too long."""

from __future__ import annotations

from server.messages import Busy, FromWorker, Ready

TICKS = 12
"""Into so many parts the limit is cut: the silence is noticed at most one part later."""

_ASK_AT = TICKS // 3
"""Ticks of silence after which the worker is asked for a sign of life: most of the limit is for the answer."""


class Watch:
    """Counts how long one worker has said nothing, by ticks of the event loop and not by a clock.

    A machine, a container or an API process that was stopped and goes on again has heard nothing for long, which is no
    fault of the worker: such a pause is one tick. Owns the count and the limit, which depends on what the worker said
    it does.
    """

    def __init__(self, answer_s: float, load_s: float) -> None:
        """`answer_s` is the limit of a worker that is ready, `load_s` that of one that still loads."""
        self.tick_s = answer_s / TICKS
        self.limit_s = load_s
        self.is_loading = True
        self._answer_s = answer_s
        self._num_silent = 0

    def on_bytes(self) -> None:
        """Something came from the worker, be it a part of a message."""
        self._num_silent = 0

    def on_message(self, message: FromWorker) -> None:
        """The worker said what it does, or that what was to take long is over."""
        if isinstance(message, Ready):
            self.is_loading = False
        if not self.is_loading:
            self.limit_s = self._answer_s + (message.for_s if isinstance(message, Busy) else 0.0)

    def tick(self) -> bool:
        """`tick_s` have passed. Returns: whether to ask the worker for a sign of life."""
        self._num_silent += 1
        return not self.is_loading and self._num_silent == _ASK_AT

    @property
    def is_over(self) -> bool:
        """Whether the silence has reached the limit."""
        return self._num_silent * self.tick_s >= self.limit_s
