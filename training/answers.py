"""Answers that the target writes by itself, for `foretoken build-trigram --generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tqdm import tqdm

from server.config import Settings, SettingsError
from server.engine import Engine
from server.errors import ServingError
from server.messages import Ready, Speculation, Submit
from verifier.plan import SamplingParams

_PAYING_TOKENS = 50_000
"""Compiling a pass takes about as long as it saves on so many tokens of a small model."""


def pays_to_compile(num_answers: int, max_tokens: int) -> bool:
    """Whether the target's pass should be compiled before it writes so many answers."""
    return num_answers * max_tokens >= _PAYING_TOKENS


@dataclass(frozen=True, slots=True)
class Writing:
    """What the target is asked to write: `num_answers` answers, the prompts taken in turn."""

    prompts: tuple[tuple[int, ...], ...]
    num_answers: int
    max_tokens: int
    temperature: float
    seed: int
    eos_ids: tuple[int, ...]

    def check(self, max_model_len: int) -> None:
        """Raises SettingsError naming the first prompt that is empty or leaves no room for an answer."""
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt:
                raise SettingsError(f"--prompts: prompt {number} is empty")
            if len(prompt) >= max_model_len:
                raise SettingsError(
                    f"--prompts: prompt {number} has {len(prompt)} tokens, which leaves no room for an answer in the "
                    f"model's context of {max_model_len}"
                )

    def submits(self, max_model_len: int, vocab_size: int) -> Iterator[Submit]:
        """One request an answer, each with a seed of its own, cut to the model's context."""
        stop_ids = tuple(token for token in self.eos_ids if token < vocab_size)
        for index in range(self.num_answers):
            prompt = self.prompts[index % len(self.prompts)]
            yield Submit(
                id=f"answer-{index}",
                prompt=prompt,
                sampling=SamplingParams(
                    max_tokens=min(self.max_tokens, max_model_len - len(prompt)),
                    seed=self.seed + index,
                    temperature=self.temperature,
                    stop_ids=stop_ids,
                ),
                speculation=Speculation(drafter="none", max_nodes=1),
                tenant="build-trigram",
            )


class Answers:
    """Token ids of one answer after the other, in no order; as many are being written at once as the target has rows.

    Each comes with the two prompt tokens that its first tri-grams need. Owns the engine and its event loop, between
    entering and leaving. Raises on entering: StartupError if the target cannot be loaded, SettingsError for a prompt
    that does not fit; later SettingsError if an answer fails. Between two answers the loop stands still: the worker
    waits for whoever counts them.
    """

    def __init__(self, settings: Settings, writing: Writing, *, shows_progress: bool):
        self._settings = settings
        self._writing = writing
        self._shows_progress = shows_progress
        self._runner = asyncio.Runner()
        self._engine: Engine | None = None
        self._tasks: set[asyncio.Task[list[int]]] = set()

    def __enter__(self) -> Self:
        try:
            self._info = self._runner.run(self._start())
            self._writing.check(self._info.max_model_len)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __iter__(self) -> Iterator[list[int]]:
        waiting = self._writing.submits(self._info.max_model_len, self._info.vocab_size)
        with tqdm(total=self._writing.num_answers, desc="answers", disable=not self._shows_progress) as bar:
            while documents := self._runner.run(self._next(waiting)):
                yield from documents
                bar.update(len(documents))

    async def _start(self) -> Ready:
        self._engine = Engine(self._settings, None)
        await self._engine.start()
        await self._engine.wait_ready()
        assert self._engine.info is not None, "ready without a word"
        return self._engine.info

    async def _next(self, waiting: Iterator[Submit]) -> list[list[int]]:
        """The answers that end next; none when all are written."""
        while len(self._tasks) < self._settings.max_num_seqs and (submit := next(waiting, None)) is not None:
            self._tasks.add(asyncio.create_task(self._answer(submit)))
        if not self._tasks:
            return []
        done, self._tasks = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        try:
            return [task.result() for task in done]
        except ServingError as error:
            raise SettingsError(f"--generate: {error.message}") from error

    async def _answer(self, submit: Submit) -> list[int]:
        assert self._engine is not None, "no engine"
        tokens = list(submit.prompt[-2:])
        async with aclosing(self._engine.stream(submit)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                tokens.extend(delta.tokens)
        return tokens

    def _close(self) -> None:
        try:
            self._runner.run(self._end())
        finally:
            self._runner.close()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()
