"""What may follow in one answer: a grammar, allowed tokens, banned sequences; and what they do to draft trees."""

from __future__ import annotations

import json

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from drafters.base import Source
from server import demo
from server.messages import Constraint
from server.worker.constraint import RowConstraint, Rules, num_words
from verifier.tree import DraftTrees

VOCAB, END = 4100, 0
TOKENIZER = LLTokenizer((demo.MODEL / "tokenizer.json").read_text(encoding="utf-8"), n_vocab=VOCAB, eos_token=[END])
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
GRAMMAR = LLMatcher.grammar_from_json_schema({**COLOURS, "additionalProperties": False, "x-guidance": COMPACT})


def ids(text: str) -> list[int]:
    return [int(token) for token in TOKENIZER.tokenize_str(text)]


def constraint(grammar: str = "", answer: str = "", **limits: tuple[object, ...]) -> RowConstraint:
    rules = Rules(Constraint(grammar, **limits), (END,), VOCAB)  # type: ignore[arg-type]
    return RowConstraint(rules, LLMatcher(TOKENIZER, grammar, log_level=0) if grammar else None, ids(answer))


def following(row: RowConstraint, tokens: list[int] | None = None) -> list[set[int]]:
    """What may follow each node of a chain behind the root."""
    chain = [1, *(tokens or [])]
    bits = np.zeros((len(chain), num_words(VOCAB)), np.int32)
    row.fill(chain, list(range(-1, len(chain) - 1)), bits)
    flags = np.unpackbits(bits.view(np.uint8), axis=1, count=VOCAB, bitorder="little")
    return [set(np.flatnonzero(line).tolist()) for line in flags]


def guided(row: RowConstraint, tokens: list[int], parents: list[int], most: int = 64) -> list[tuple[int, int, int]]:
    """(token, parent, source) of the nodes of a drafted tree that stay, or come."""
    trees = DraftTrees.allocate(1)
    trees.append([1, *tokens], [-1, *parents], [1.0] * (len(tokens) + 1), [0] + [int(Source.OTHER)] * len(tokens))
    made, above, _, sources = row.guide(trees, 0, most)
    return list(zip(made, above, sources, strict=True))


def test_a_grammar_says_what_may_follow_each_node() -> None:
    row = constraint(GRAMMAR)
    chain = ids('{"colour": "')
    found = following(row, chain)
    assert [chain[place] in allowed for place, allowed in enumerate(found[:-1])] == [True] * len(chain)
    assert found[0] == {chain[0]}, "one way to begin"
    assert all(TOKENIZER.decode_str([token])[0] in "rg" for token in found[-1])
    assert found[0] == following(row)[0], "looking changes nothing"


def test_an_answer_ends_where_the_grammar_does() -> None:
    row = constraint(GRAMMAR, '{"colour": "red"}')
    assert following(row) == [{END}]
    assert row.num_forced == 1
    assert guided(row, [], []) == [(1, -1, 0), (END, 0, Source.GRAMMAR)]


def test_an_answer_won_before_is_read_again() -> None:
    whole = ids('{"colour": "red"}')
    row = constraint(GRAMMAR)
    for token in whole[:5]:
        row.advance([token])
    again = constraint(GRAMMAR, TOKENIZER.decode_str(whole[:5]))
    assert following(row) == following(again)


def test_certain_tokens_are_drafted_and_what_cannot_be_is_not() -> None:
    chain = ids('{"colour": "')
    row = constraint(GRAMMAR)
    assert row.num_forced == len(chain)
    wrong = ids("table")[:1]
    made = guided(row, wrong, [0])
    assert [token for token, _, _ in made[1:]] == chain
    assert {source for _, _, source in made[1:]} == {Source.GRAMMAR}
    assert [parent for _, parent, _ in made] == list(range(-1, len(chain)))


def test_drafts_go_on_behind_certain_tokens_and_before_them() -> None:
    start, colour, rest = ids('{"colour": "'), ids("red"), ids('"}')
    drafted = [*start, *colour]
    made = guided(constraint(GRAMMAR), drafted, list(range(len(drafted))))
    assert [token for token, _, _ in made[1:]] == [*start, *colour, *rest, END]
    assert made[len(start) + 1][2] == Source.OTHER, "a colour is a guess"


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_nodes_than_there_is_room_for(most: int) -> None:
    assert len(guided(constraint(GRAMMAR), [], [], most)) == most


def test_siblings_stay_apart() -> None:
    row = constraint(LLMatcher.grammar_from_regex("(ab|cd)e"))
    first, second, wrong = ids("a")[0], ids("c")[0], ids("x")[0]
    made = guided(row, [first, wrong, second], [0, 0, 0])
    children = [token for token, parent, _ in made if parent == 0]
    assert children == [first, second]
    trees = DraftTrees.allocate(1)
    trees.append(*zip(*[(token, parent, 1.0, source) for token, parent, source in made], strict=True))
    trees.check()


def test_only_allowed_tokens() -> None:
    row = constraint(allowed=(5, 7, 4099))
    assert following(row, [5]) == [{5, 7, 4099}] * 2
    assert [token for token, _, _ in guided(row, [5, 6, 7], [0, 1, 0])] == [1, 5, 7]


def test_banned_sequences_end_nowhere() -> None:
    everything = set(range(VOCAB))
    row = constraint(banned=((9,), (5, 6), (5, 7, 8)))
    assert following(row, [5, 7]) == [everything - {9}, everything - {9, 6}, everything - {9, 8}]
    row.advance([5])
    assert following(row) == [everything - {9, 6}], "the answer so far counts"
    row.advance([7])
    assert following(row) == [everything - {9, 8}]
    assert [token for token, _, _ in guided(row, [8, 4], [0, 0])] == [1, 4]


def test_grammar_and_limits_hold_together() -> None:
    red = ids("r")[0]
    row = constraint(GRAMMAR, '{"colour": "', banned=((red,),))
    assert row.num_forced == 0, "what is forced may be banned"
    assert red not in following(row)[0]
    assert following(row)[0]


def test_a_dead_end_allows_nothing_and_is_told() -> None:
    row = constraint(GRAMMAR, allowed=(END,))
    assert following(row) == [set()]
    broken = constraint(GRAMMAR, "no colour")
    assert following(broken) == [set()]
    assert broken.fault
    assert json.dumps(broken.fault)


def test_a_dead_end_is_no_end() -> None:
    row = constraint(LLMatcher.grammar_from_lark('start: "a" X | "b"\nX: /c/ & /d/'), "a")
    assert following(row) == [set()]
    assert row.fault


def test_a_dead_end_that_only_a_draft_ran_into_changes_nothing() -> None:
    # Behind "a" no text satisfies both sides; behind "c" one does.
    grammar = LLMatcher.grammar_from_lark('start: "a" DEAD | "c" "d"\nDEAD: /[xy]/ & /[zw]/')
    first, second, third = ids("a")[0], ids("c")[0], ids("d")[0]
    row = constraint(grammar)
    before = following(row)
    bits = np.zeros((4, num_words(VOCAB)), np.int32)
    row.fill([1, first, second, third], [-1, 0, 0, 2], bits)
    flags = np.unpackbits(bits.view(np.uint8), axis=1, count=VOCAB, bitorder="little")
    assert third in np.flatnonzero(flags[2])
    assert following(row) == before
    row.advance([second])
    assert third in following(row)[0]
    assert not row.fault
