"""What the target is asked when it writes the answers that a head is trained on: prompts out of corpus files."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from drafters.ngram.table import TableError
from server.config import SettingsError
from server.errors import InvalidRequest
from training.build_trigram import Reader
from training.corpus_reader import Messages, Reading, check_names, read_dialogues

TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
"""Each answer gets one of these, at random: half of them are greedy."""
_MAX_ROUNDS = 4
"""A small corpus is asked so often at most, with other cuts and seeds."""
_BEGINNING = (16, 80)
"""A plain text is cut after so many tokens, at least and at most."""
_BEGINNING_CHARS = 4000
"""More than enough characters for that."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to be written. Its number is its sampling seed."""

    prompt: tuple[int, ...]
    temperature: float
    document: int
    """Number of the text or dialogue that the prompt is from. The turns of a dialogue follow each other."""


@dataclass(frozen=True, slots=True)
class Asked:
    """All that is asked, and what reading the corpus came to."""

    asks: tuple[Ask, ...]
    reading: Reading

    @property
    def digest(self) -> str:
        """Of the prompts and temperatures."""
        digest = hashlib.sha256()
        for ask in self.asks:
            digest.update(array("q", ask.prompt).tobytes())
            digest.update(repr((len(ask.prompt), ask.temperature, ask.document)).encode())
        return digest.hexdigest()


def read_asks(paths: Sequence[Path], reader: Reader, num_answers: int, separator: str, seed: int) -> Asked:
    """Up to `num_answers` prompts: the same ones for the same files and seed.

    Of a dialogue each assistant turn is asked for, after what comes before it; of a plain text a beginning. Malformed
    lines are counted and left out. Raises: SettingsError in one line when nothing can be read or asked.
    """
    reading = Reading()
    stream = random.Random(seed)
    try:
        check_names(list(paths))
        documents = _sample(_documents(paths, separator, reading), num_answers, stream)
    except TableError as error:
        raise SettingsError(f"--data: {error}") from error
    asks: list[Ask] = []
    for turn in range(_MAX_ROUNDS):
        num_before = len(asks)
        for number, document in enumerate(documents):
            if len(asks) >= num_answers:
                break
            asks += _asks_of(document, number, reader, stream, is_again=turn > 0)
        if len(asks) == num_before:
            break
    if not asks:
        hint = f" ({reading.malformed[0]})" if reading.malformed else ""
        raise SettingsError(f"--data: {reading.num_documents} documents, and nothing in them to ask the model{hint}")
    return Asked(tuple(asks[:num_answers]), reading)


def _documents(paths: Sequence[Path], separator: str, reading: Reading) -> Iterator[str | Messages]:
    for path in paths:
        yield from read_dialogues(path, separator, reading)


def _sample(documents: Iterator[str | Messages], count: int, stream: random.Random) -> list[str | Messages]:
    """`count` of the documents at random, in random order (reservoir sampling, Vitter's algorithm R)."""
    chosen: list[str | Messages] = []
    for index, document in enumerate(documents):
        if index < count:
            chosen.append(document)
        elif (place := stream.randrange(index + 1)) < count:
            chosen[place] = document
    stream.shuffle(chosen)
    return chosen


def _asks_of(
    document: str | Messages, number: int, reader: Reader, stream: random.Random, *, is_again: bool
) -> list[Ask]:
    """What is asked of one document. What was asked before is not asked at temperature 0 again: it is known."""
    if isinstance(document, str):
        ids = reader.encode([document[:_BEGINNING_CHARS]])[0]
        prompt = tuple(ids[: stream.randint(*_BEGINNING)])
        return [Ask(prompt, stream.choice(TEMPERATURES), number)] if prompt else []
    temperatures = [heat for heat in TEMPERATURES if heat > 0.0] if is_again else TEMPERATURES
    asks = []
    for messages in _turns(document):
        try:
            prompt = tuple(reader.chat_ids(messages))
        except InvalidRequest:
            continue  # the template's own rules, such as strictly alternating roles, leave this turn out
        asks.append(Ask(prompt, stream.choice(temperatures), number))
    return asks


def _turns(messages: Messages) -> Iterator[Messages]:
    """What stands before each assistant turn, and the whole where the last word is not the assistant's."""
    for index in range(1, len(messages) + 1):
        is_asked = index == len(messages) or messages[index]["role"] == "assistant"
        if is_asked and messages[index - 1]["role"] != "assistant":
            yield messages[:index]
