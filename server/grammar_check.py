"""Compiling a grammar to see whether it can be compiled, for a process that may be ended in the middle of it.

A grammar of a few lines may take minutes, or nest so deeply that the compiler overruns its stack. So it is compiled on
a small stack: what passes here has room in any thread elsewhere.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from server.errors import InvalidRequest, UnsupportedParameter
from server.grammar import LIMITS, Grammar, from_lark
from server.schema_form import can_end

STACK_BYTES = 2**20
"""A thread has eight times as much, unless it is told otherwise."""
MAX_FORCED_BYTES = 2**14
"""A grammar that leaves no choice for longer than this most likely never ends."""

_MAX_REASON = 200
_GBNF = re.compile(r"(?m)^[ \t]*[\w-]+[ \t]*::=")
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/')
"""What a Lark grammar may hold anything in: texts, comments and regexes."""
_OPTION = re.compile(r"\[[^\[\]]*\b(max_tokens|temperature|stop)\s*=")
_POSITION = re.compile(r"^(?:at )?(\d+)\(\d+\): ")
_REGEX_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)

Result = TypeVar("Result")


class GrammarChecker:
    """Compiles grammars against a vocabulary of single bytes and the names of the special tokens. Owns that vocabulary.

    The model's own takes seconds to prepare, and hardly anything depends on how the text is cut into tokens.
    """

    def __init__(self, special_tokens: Sequence[str]):
        import llguidance  # takes a tenth of a second, which only this process has to spare

        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(_Bytes(special_tokens), slices=[])  # type: ignore[arg-type]
        self._limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)

    def check(self, grammar: Grammar) -> str:
        """The text of a grammar that can be compiled, in llguidance's own form. Raises InvalidRequest."""
        if grammar.is_foreign:
            grammar = _own_form(grammar)
        if reason := _on_small_stack(lambda: self._fault(grammar.text)):
            raise InvalidRequest(f"'{grammar.param}' cannot be compiled: {reason}.", param=grammar.param)
        return grammar.text

    def _fault(self, text: str) -> str:
        """Why a grammar is of no use; empty if it is fine."""
        matcher = self._library.LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        matcher.compute_bitmask()  # only then a grammar that no text satisfies, or a regex of too much work, is noticed
        if matcher.is_error():
            return explain(matcher.get_error())
        if not all(can_end(part.get("json_schema")) for part in json.loads(text)["grammars"]):
            return "no value satisfies it: it is recursive without an end"
        forced = list(matcher.compute_ff_bytes())
        if len(forced) > MAX_FORCED_BYTES:
            return f"its texts never end, or begin with more than {MAX_FORCED_BYTES} bytes that leave no choice"
        if forced and matcher.try_consume_tokens(forced) == len(forced):
            matcher.compute_bitmask()  # and only here that nothing can follow them
            if matcher.is_error():
                return "no text satisfies it: nothing can follow what it begins with"
        return ""


class _Bytes:
    """A vocabulary in the form that llguidance takes: every byte, the end, and special tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256

    def __init__(self, special_tokens: Sequence[str]):
        names = [name.encode() for name in dict.fromkeys(special_tokens)]
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<|end of the answer|>", *names]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def explain(message: str) -> str:
    """What llguidance says, in one line without the client's own text."""
    message = message.removesuffix("\n<non-verbose/>").strip()
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    if found := _REGEX_ERROR.search(message):
        return f"a regular expression of it is at fault: {found.group(1)}"[:_MAX_REASON]
    line = message.splitlines()[0] if message else "unknown fault"
    line = _POSITION.sub(r"line \1: ", line)
    if line == "schema too large":
        line = "the limit of the compiler is met when its allOf, anyOf and $ref are merged (schema too large)"
    if "too many expressions" in line:
        line = f"the limit of {LIMITS['initial_lexer_fuel']} steps for its regular expressions is met ({line})"
    return line[:_MAX_REASON].rstrip(".")


def _own_form(grammar: Grammar) -> Grammar:
    """A client's grammar as llguidance takes it. Raises InvalidRequest."""
    param, text = grammar.param, grammar.text
    if _GBNF.search(text):
        return from_lark(_from_gbnf(text, param), param)
    bare = _QUOTED.sub('""', text)
    if "<" in bare:
        message = f"'{param}' names a special token, which is not supported: a grammar is of the answer's text."
        raise UnsupportedParameter(message, param=param)
    if found := _OPTION.search(bare):
        raise UnsupportedParameter(f"'{param}' sets '{found.group(1)}' in a rule, which is not supported.", param=param)
    return from_lark(text, param)


def _from_gbnf(text: str, param: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except MemoryError:
        raise
    except Exception as error:  # foreign code, which meets bad text with whatever exception comes
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InvalidRequest(f"'{param}' is not valid GBNF: {reason[:_MAX_REASON]}.", param=param) from None


def _on_small_stack(work: Callable[[], Result]) -> Result:
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    if errors:
        raise errors[0]
    result: Result = results[0]
    return result
