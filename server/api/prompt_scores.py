"""How likely the model finds the tokens of a prompt: gathered as they come, told as an echo or as `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Iterator

from server.detokenize import Reader
from server.messages import TokenLogprob


class PromptScores:
    """What is known of one prompt's tokens. Owns their log-probabilities; the worker sends them piece by piece."""

    def __init__(self, ids: tuple[int, ...], echo: str | None, reader: Reader):
        self.logprobs: list[TokenLogprob] = []
        """Of all tokens but the first, as far as they have come."""
        self._ids = ids
        self._echo = echo
        self._reader = reader
        self.num_echoed = 0 if echo is None else len(echo)
        """Characters that stand before the answer."""

    def add(self, logprobs: tuple[TokenLogprob, ...]) -> None:
        """The next ones."""
        self.logprobs += logprobs

    def take_echo(self) -> str | None:
        """The text to show before the answer, once."""
        echo, self._echo = self._echo, None
        return echo

    def echoed(self) -> Iterator[tuple[int, TokenLogprob | None, int]]:
        """Each token, its log-probability and the characters before it; nothing tells how likely the first one is."""
        assert len(self.logprobs) == len(self._ids) - 1, f"{len(self.logprobs)} of {len(self._ids)} tokens are scored"
        offset = 0
        for token, logprob in zip(self._ids, (None, *self.logprobs), strict=True):
            yield token, logprob, offset
            offset += len(self._reader.feed((token,)))
