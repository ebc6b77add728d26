"""One request's state: where an answer ends, what counts, what is recorded."""

from __future__ import annotations

import pytest

from server.worker.pages import page_digest, tenant_digest
from server.worker.sequence import Sequence, Status
from tests.fakes import submit_of


def generating(max_tokens: int = 10, stop_ids: tuple[int, ...] = (), context_len: int = 100) -> Sequence:
    sequence = Sequence(submit_of([1, 2, 3], max_tokens=max_tokens, stop_ids=stop_ids), 0, context_len)
    sequence.status = Status.GENERATING
    sequence.num_cached = 3
    return sequence


def test_won_tokens_keep_the_invariant() -> None:
    sequence = generating()
    assert sequence.commit([7, 8]) == 2
    assert sequence.tokens == [1, 2, 3, 7, 8]
    assert sequence.num_cached == len(sequence.tokens) - 1
    assert sequence.finish_reason is None


def test_a_stop_id_ends_the_answer_and_what_came_after_never_happened() -> None:
    sequence = generating(stop_ids=(5, 6))
    assert sequence.commit([7, 6, 5, 8]) == 2
    assert sequence.tokens[3:] == [7, 6]
    assert (sequence.finish_reason, sequence.stop_token) == ("stop", 6)
    assert sequence.num_cached == len(sequence.tokens) - 1


def test_max_tokens_ends_the_answer() -> None:
    sequence = generating(max_tokens=2)
    assert sequence.commit([7, 8, 9]) == 2
    assert (sequence.finish_reason, sequence.stop_token) == ("length", None)


def test_a_stop_id_beyond_max_tokens_does_not_count() -> None:
    sequence = generating(max_tokens=1, stop_ids=(8,))
    assert sequence.commit([7, 8]) == 1
    assert sequence.finish_reason == "length"


def test_a_stop_id_as_the_last_possible_token_is_a_stop() -> None:
    sequence = generating(max_tokens=2, stop_ids=(8,))
    sequence.commit([7, 8])
    assert sequence.finish_reason == "stop"


def test_the_context_ends_the_answer() -> None:
    sequence = generating(context_len=5)
    assert sequence.commit([7, 8, 9]) == 2
    assert sequence.finish_reason == "length"
    assert len(sequence.tokens) == 5


def test_tokens_won_before_a_worker_died_count_towards_the_limits() -> None:
    sequence = Sequence(submit_of([1, 2], answer=[3, 4], max_tokens=3), 0, 100)
    assert sequence.num_prompt == 2
    assert sequence.tokens == [1, 2, 3, 4]
    assert sequence.num_left == 1


def test_tokens_are_won_only_while_generating() -> None:
    sequence = Sequence(submit_of([1]), 0, 100)
    with pytest.raises(AssertionError):
        sequence.commit([2])


def test_the_record_counts_steps_by_accepted_drafts() -> None:
    sequence = generating()
    for num_drafted, num_accepted in [(15, 0), (15, 3), (7, 0)]:
        sequence.count_drafts(num_drafted, num_accepted)
    record = sequence.record()
    assert record.histogram == (2, 0, 0, 1)
    assert sum(record.histogram) == record.num_steps == 3
    assert (record.num_draft_tokens, record.num_accepted_tokens) == (37, 3)


def test_page_digests_are_chained_and_grow_with_the_answer() -> None:
    sequence = generating()
    first = page_digest(tenant_digest(""), [1, 2])
    assert sequence.page_digests(1, 2) == [first]
    sequence.commit([7])
    assert sequence.page_digests(2, 2) == [first, page_digest(first, [3, 7])]


@pytest.mark.parametrize(("drafter", "max_nodes"), [("none", 16), ("trigram", 1)])
def test_a_request_without_drafts_belongs_to_no_drafter(drafter: str, max_nodes: int) -> None:
    sequence = Sequence(submit_of([1], drafter=drafter, max_nodes=max_nodes), 0, 100)
    assert (sequence.drafter, sequence.max_nodes) == ("none", 1)
