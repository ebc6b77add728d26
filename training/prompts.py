"""What the target is asked when it writes the answers that a head is trained on: prompts out of corpus files."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from server.config import SettingsError
from server.errors import InvalidRequest
from training.corpus_reader import CorpusStats, Messages, check_names, read_documents
from training.text import TextEncoder

TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
"""Each answer gets one of these, at random: half of them are greedy."""
_MAX_ROUNDS = 4
"""A small corpus is asked so often at most, with other cuts and seeds."""
_BEGINNING = (16, 80)
"""A plain text is cut after so many tokens, at least and at most."""
_BEGINNING_CHARS = 4000
"""More than enough characters for that."""


@dataclass(frozen=True, slots=True)
class AnswerPrompt:
    """What one answer is written to."""

    tokens: tuple[int, ...]
    temperature: float
    document: int
    """Number of the text or dialogue that the prompt is from. The turns of a dialogue follow each other."""


def digest_of(prompts: Sequence[AnswerPrompt]) -> str:
    """Digest of tokens, temperatures and documents. It names the answers on disk: do not change it."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(array("q", prompt.tokens).tobytes())
        digest.update(repr((len(prompt.tokens), prompt.temperature, prompt.document)).encode())
    return digest.hexdigest()


def corpus_prompts(
    paths: Sequence[Path], encoder: TextEncoder, num_answers: int, separator: str, seed: int
) -> tuple[list[AnswerPrompt], CorpusStats]:
    """Up to `num_answers` prompts, the same ones for the same files and seed; and what reading the files came to.

    Of a dialogue each assistant turn is asked for, after what comes before it; of a plain text a beginning. Malformed
    lines are counted and left out. Raises: SettingsError in one line when nothing can be read or asked.
    """
    stats = CorpusStats()
    stream = random.Random(seed)
    check_names(paths)
    found = chain.from_iterable(read_documents(path, separator, stats, list) for path in paths)
    documents = _sample(found, num_answers, stream)
    prompts: list[AnswerPrompt] = []
    for turn in range(_MAX_ROUNDS):
        for number, document in enumerate(documents):
            if len(prompts) >= num_answers:
                break
            prompts += _prompts_of(document, number, encoder, stream, is_again=turn > 0)
    if not prompts:
        hint = f" ({stats.malformed[0]})" if stats.malformed else ""
        raise SettingsError(f"--data: {stats.num_documents} documents, and nothing in them to ask the model{hint}")
    return prompts[:num_answers], stats


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


def _prompts_of(
    document: str | Messages, number: int, encoder: TextEncoder, stream: random.Random, *, is_again: bool
) -> list[AnswerPrompt]:
    """The prompts of one document. A chat that was asked before is not asked at temperature 0: that answer is known."""
    if isinstance(document, str):
        ids = encoder.encode([document[:_BEGINNING_CHARS]])[0]
        tokens = tuple(ids[: stream.randint(*_BEGINNING)])
        return [AnswerPrompt(tokens, stream.choice(TEMPERATURES), number)] if tokens else []
    temperatures = [temperature for temperature in TEMPERATURES if temperature or not is_again]
    prompts = []
    for messages in _turns(document):
        try:
            tokens = tuple(encoder.chat_ids(messages))
        except InvalidRequest:
            continue  # the template's own rules, such as strictly alternating roles, leave this turn out
        prompts.append(AnswerPrompt(tokens, stream.choice(temperatures), number))
    return prompts


def _turns(messages: Messages) -> Iterator[Messages]:
    """What stands before each assistant turn, and the whole where the last word is not the assistant's."""
    for index in range(1, len(messages) + 1):
        is_asked = index == len(messages) or messages[index]["role"] == "assistant"
        if is_asked and messages[index - 1]["role"] != "assistant":
            yield messages[:index]
