"""Promise 1 under constraints: what a grammar or token limits allow, the same with speculation on and off."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import msgspec
import pytest
from llguidance import LLMatcher

from drafters.base import Drafter
from server import demo
from server.messages import Abort, Constraint, RequestError, Speculation, Submit, Vocabulary
from server.model_files import read
from server.tokenizer import end_ids, load_tokenizer
from server.worker.loop import Loop
from tests.drafting import make_views
from tests.parity.harness import AnswerFuzz, Run, make_loop, run_all
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import SamplingParams

FILES = read(demo.MODEL)
TOKENIZER = load_tokenizer(FILES)
ENDS = end_ids(FILES, TOKENIZER)
PROMPT = tuple(TOKENIZER.encode("Find me a table for two tonight.").ids)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "colour": {"enum": ["red", "green", "blue"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "colour", "tags"],
    "additionalProperties": False,
}
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
JSON = Constraint(LLMatcher.grammar_from_json_schema({**SCHEMA, "x-guidance": COMPACT}))
CONSTRAINTS: dict[str, Constraint | None] = {
    "json": JSON,
    "free": None,
    "regex": Constraint(LLMatcher.grammar_from_regex(r"[a-z ]{10,30}\.")),
    "allowed": Constraint(allowed=(*ENDS, *range(60, 90), 300, 301)),
    "banned": Constraint(banned=((11,), (12, 13), *((token,) for token in range(200, 260)))),
}


@pytest.fixture(scope="module")
def backend() -> Backend:
    options = VerifierOptions(
        model=str(demo.MODEL),
        device="cpu",
        threads=1,
        max_rows=4,
        max_positions=96,
        max_model_len=256,
        page_size=8,
        is_compiled=True,
    )
    return load_backend(options)


def loop_with(backend: Backend, drafters: Mapping[str, Drafter]) -> Loop:
    loop = make_loop(backend, drafters, max_batched_tokens=96)
    loop.grammars.learn(Vocabulary(FILES.tokenizer_json, ENDS))
    return loop


def requests(drafter: str, temperature: float, **sampling: Any) -> list[Submit]:
    made = []
    for index, (name, constraint) in enumerate(CONSTRAINTS.items()):
        params = SamplingParams(max_tokens=70, seed=index, temperature=temperature, stop_ids=ENDS, **sampling)
        speculation = Speculation(drafter, 16 if drafter != "none" else 1)
        made.append(Submit(name, PROMPT, params, speculation, "public", constraint=constraint))
    return made


def run(loop: Loop, submits: Sequence[Submit]) -> Run:
    """As run_all, once all grammars are compiled: it takes the order of steps for granted."""
    for one in submits:
        loop.handle(one)
    began = time.monotonic()
    while loop.grammars.num_pending and not loop.grammars.has_ready:
        assert time.monotonic() - began < 60
        time.sleep(0.002)
    return run_all(loop, [])


def text(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode([token for token in tokens if token not in ENDS]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_text_with_speculation_on_and_off(backend: Backend, temperature: float) -> None:
    plain = run(loop_with(backend, {}), requests("none", temperature, num_logprobs=1))
    drafters = {**make_views(len(TOKENIZER.get_vocab())), "fuzz": AnswerFuzz(3, 4096, {PROMPT: plain.answers["json"]})}
    for drafter in ("hybrid", "fuzz"):
        drafted = run(loop_with(backend, drafters), requests(drafter, temperature, num_logprobs=1))
        assert drafted.answers == plain.answers
        assert drafted.reasons == plain.reasons
        for name, deltas in plain.deltas.items():
            told = [one for delta in drafted.deltas[name] for one in delta.logprobs or ()]
            assert [one.logprob for delta in deltas for one in delta.logprobs or ()] == [one.logprob for one in told]
        assert drafted.num_steps < 0.8 * plain.num_steps, "certain tokens are drafted"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_keep_to_their_constraints(backend: Backend, temperature: float) -> None:
    found = run(loop_with(backend, {}), requests("none", temperature, repetition_penalty=1.1))
    assert found.reasons["json"] == "stop"
    jsonschema.validate(json.loads(text(found.answers["json"])), SCHEMA)
    assert 11 <= len(text(found.answers["regex"])) <= 31
    assert text(found.answers["regex"]).endswith(".")
    assert set(found.answers["allowed"]) <= set(CONSTRAINTS["allowed"].allowed)  # type: ignore[union-attr]
    banned = found.answers["banned"]
    assert not set(banned) & {11, *range(200, 260)}
    assert (12, 13) not in set(itertools.pairwise(banned))


def test_a_resumed_answer_goes_on_as_it_would_have(backend: Backend) -> None:
    submits = requests("none", 1.0)
    whole = run(loop_with(backend, {}), submits)
    for cut in (1, 9, 20):
        resumed = [msgspec.structs.replace(one, answer=tuple(whole.answers[one.id][:cut])) for one in submits[:1]]
        rest = run(loop_with(backend, make_views(len(TOKENIZER.get_vocab()))), resumed)
        assert [*whole.answers["json"][:cut], *rest.answers["json"]] == whole.answers["json"]


def wait_for_errors(loop: Loop) -> list[RequestError]:
    errors: list[RequestError] = []
    while loop.has_work or loop.grammars.num_pending:
        errors += loop.step().errors if loop.has_work else ()
    return errors


def test_a_grammar_that_does_not_compile_fails_alone(backend: Backend) -> None:
    loop = loop_with(backend, {})
    good = requests("none", 0.0)[1]
    for one in (good, msgspec.structs.replace(good, id="bad", constraint=Constraint("start: /(/"))):
        loop.handle(one)
    errors = wait_for_errors(loop)
    assert [error.id for error in errors] == ["bad"]
    assert "grammar of this request cannot be used" in errors[0].message
    assert "\n" not in errors[0].message
    assert errors[0].is_callers


def test_a_dead_end_fails_alone_and_says_why(backend: Backend) -> None:
    loop = loop_with(backend, {})
    for one in requests("none", 0.0)[:2]:
        limits = None if one.constraint is None else msgspec.structs.replace(JSON, allowed=(ENDS[0],))
        loop.handle(msgspec.structs.replace(one, constraint=limits))
    errors = wait_for_errors(loop)
    assert [error.id for error in errors] == ["json"]
    assert "no token can follow" in errors[0].message
    assert errors[0].is_callers


def test_an_abort_while_the_grammar_is_compiled(backend: Backend) -> None:
    loop = loop_with(backend, {})
    loop.handle(requests("none", 0.0)[0])
    loop.handle(Abort("json"))
    assert loop.grammars.num_pending == 0
    assert wait_for_errors(loop) == []
    assert not loop.scheduler.has_work


def test_tokens_out_of_the_vocabulary_are_refused(backend: Backend) -> None:
    loop = loop_with(backend, {})
    for limits in (Constraint(allowed=(10**6,)), Constraint(banned=((1, -1),))):
        loop.handle(msgspec.structs.replace(requests("none", 0.0)[1], constraint=limits))
        assert "token ids must be" in wait_for_errors(loop)[0].message
