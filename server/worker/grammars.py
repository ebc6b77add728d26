"""Grammars are compiled beside the steps: a request waits for its own, nobody for another's."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.grammar import LIMITS
from server.messages import RequestError, Submit, Vocabulary
from server.worker.constraint import RowConstraint, Rules

_MAX_KEPT = 64
"""Compiled grammars that are remembered, at their start; most take less than a megabyte."""

logger = logging.getLogger(__name__)


class GrammarError(Exception):
    """A grammar that cannot be used; the API process has refused what it could see."""


class Grammars:
    """Makes the constraints of requests. Owns the vocabulary's trie, the compiled grammars of late, and a thread."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._pending: deque[tuple[Submit, Future[LLMatcher]]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    @property
    def num_pending(self) -> int:
        """Requests whose grammar is being compiled, or is ready to be taken."""
        return len(self._pending)

    @property
    def has_ready(self) -> bool:
        """Whether `take` would return something."""
        return bool(self._pending) and self._pending[0][1].done()

    def learn(self, vocabulary: Vocabulary) -> None:
        """What the tokens mean; told once, before the first grammar."""
        self._vocabulary = vocabulary

    def prepare(self) -> None:
        """Read the vocabulary now, for an idle moment: that takes up to a second, in which no step can run."""
        if self._vocabulary is not None and self._tokenizer is None and not self._pending:
            try:
                self._tokenizer = _read(self._vocabulary, self._vocab_size)
            except GrammarError as error:
                logger.warning("%s", error)
                self._vocabulary = None  # told again to whoever asks for a grammar

    def find(self, submit: Submit) -> RowConstraint | None:
        """The request's constraint, if nothing has to be compiled for it."""
        assert submit.constraint is not None, f"{submit.id} has no constraint"
        grammar = submit.constraint.grammar
        if not grammar:
            return self._make(submit, None)
        matcher = self._kept.get(grammar)
        if matcher is None:
            return None
        self._kept.move_to_end(grammar)
        return self._make(submit, matcher.deep_copy())

    def begin(self, submit: Submit) -> None:
        """Compile the request's grammar; `take` returns it later."""
        assert submit.constraint is not None, f"{submit.id} has no constraint"
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._pending.append((submit, self._thread.submit(self._compile, submit.constraint.grammar)))

    def take(self) -> list[tuple[Submit, RowConstraint | RequestError]]:
        """Requests whose grammars are ready, in the order they came, or why one is not."""
        found: list[tuple[Submit, RowConstraint | RequestError]] = []
        while self.has_ready:
            submit, future = self._pending.popleft()
            assert submit.constraint is not None, f"{submit.id} has no constraint"
            fault = future.exception()
            if fault is None:
                self._keep(submit.constraint.grammar, future.result())
                found.append((submit, self._make(submit, future.result().deep_copy())))
                continue
            is_known = isinstance(fault, GrammarError)
            if not is_known:  # a fault of the library must not end the steps of others
                logger.error("compiling a grammar failed", exc_info=fault)
            message = f"the grammar of this request cannot be used: {_first_line(str(fault))}"
            found.append((submit, RequestError(submit.id, message, is_callers=is_known)))
        return found

    def drop(self, request_id: str) -> bool:
        """Nobody waits for this request any more. Returns: whether it was here."""
        for index, (submit, future) in enumerate(self._pending):
            if submit.id == request_id:
                future.cancel()
                del self._pending[index]
                return True
        return False

    def _make(self, submit: Submit, matcher: LLMatcher | None) -> RowConstraint:
        assert submit.constraint is not None, f"{submit.id} has no constraint"
        rules = Rules(submit.constraint, submit.sampling.stop_ids, self._vocab_size)
        return RowConstraint(rules, matcher, submit.answer)

    def _keep(self, grammar: str, matcher: LLMatcher) -> None:
        self._kept[grammar] = matcher
        self._kept.move_to_end(grammar)
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)

    def _compile(self, grammar: str) -> LLMatcher:
        """In the thread: compiling leaves the interpreter to the steps."""
        if self._tokenizer is None:
            if self._vocabulary is None:
                raise GrammarError("this model's vocabulary cannot be used with grammars")
            self._tokenizer = _read(self._vocabulary, self._vocab_size)
        limits = LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return matcher


def _read(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The trie of a vocabulary: as many tokens as the model has logits. Raises: GrammarError."""
    ends: Sequence[int] = [token for token in vocabulary.eos_ids if token < vocab_size]
    try:
        # Without slices, which take a third of the time and make masks of JSON no quicker.
        return LLTokenizer(vocabulary.tokenizer_json, n_vocab=vocab_size, eos_token=list(ends) or None, slices=[])
    except ValueError as error:  # its tokenizer is of a kind that the library does not read
        raise GrammarError(
            f"this model's vocabulary cannot be used with grammars: {_first_line(str(error))}"
        ) from error


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason was given")[:300]
