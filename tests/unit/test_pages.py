"""The page book: nothing is lost, nothing is held twice, prefixes are found again and only where they may be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.worker.pages import TRASH_PAGE, PageBook, page_digest, tenant_digest


def chain(tokens: list[int], page_size: int, tenant: str = "") -> list[bytes]:
    digests, parent = [], tenant_digest(tenant)
    for start in range(0, len(tokens) - page_size + 1, page_size):
        parent = page_digest(parent, tokens[start : start + page_size])
        digests.append(parent)
    return digests


def taken(book: PageBook, count: int) -> list[int]:
    pages = book.take(count)
    assert pages is not None
    return pages


def test_the_trash_page_is_never_handed_out() -> None:
    book = PageBook(5, 4)
    pages = taken(book, 4)
    assert sorted(pages) == [1, 2, 3, 4]
    assert TRASH_PAGE not in pages
    assert book.take(1) is None
    book.check_integrity([pages])


def test_take_is_all_or_nothing() -> None:
    book = PageBook(5, 4)
    assert book.take(5) is None
    assert book.num_free == book.num_usable == 4
    book.check_integrity([])


def test_released_pages_with_a_name_answer_until_they_are_evicted() -> None:
    book = PageBook(4, 2)
    digests = chain([1, 2, 3, 4], 2)
    pages = taken(book, 2)
    for page, digest in zip(pages, digests, strict=True):
        book.publish(page, digest)
    book.release(pages)
    assert book.num_free == 3
    assert book.match(digests) == pages
    book.hold(pages)
    assert book.num_free == 1
    book.release(pages)
    others = taken(book, 2)  # the free page first, then the oldest idle one: the end of the chain
    assert book.match(digests) == pages[:1]
    assert pages[1] in others
    book.check_integrity([others])


def test_eviction_takes_the_least_recently_used_prefix_first() -> None:
    book = PageBook(3, 1)
    first, second = chain([1], 1), chain([2], 1)
    for digests in (first, second):
        page = taken(book, 1)
        book.publish(page[0], digests[0])
        book.release(page)
    again = book.match(first)
    book.hold(again)
    book.release(again)
    taken(book, 1)
    assert book.match(second) == []
    assert book.match(first) == again


def test_a_shared_page_stays_until_its_last_holder_leaves() -> None:
    book = PageBook(3, 2)
    digest = chain([1, 2], 2)
    pages = taken(book, 1)
    book.publish(pages[0], digest[0])
    book.hold(pages)
    book.release(pages)
    assert book.num_free == 1
    book.check_integrity([pages])
    book.release(pages)
    assert book.num_free == 2
    with pytest.raises(AssertionError):
        book.release(pages)


def test_a_forgotten_page_answers_nobody() -> None:
    book = PageBook(3, 2)
    digest = chain([1, 2], 2)
    pages = taken(book, 1)
    book.publish(pages[0], digest[0])
    book.forget(pages)
    assert book.match(digest) == []
    book.release(pages)
    book.check_integrity([])


def test_of_two_pages_with_one_content_the_first_is_named() -> None:
    book = PageBook(4, 2)
    digest = chain([1, 2], 2)
    pages = taken(book, 2)
    book.publish(pages[0], digest[0])
    book.publish(pages[1], digest[0])
    assert book.match(digest) == pages[:1]
    book.release(pages)
    book.check_integrity([])


def test_names_depend_on_tenant_and_on_everything_before() -> None:
    assert chain([1, 2], 2, "a") != chain([1, 2], 2, "b")
    assert chain([1, 2, 3, 4], 2)[1] != chain([9, 2, 3, 4], 2)[1]
    assert chain([1, 2, 3, 4], 2)[1] != chain([3, 4], 2)[0]
    assert chain([1, 2, 3, 4], 2)[0] == chain([1, 2, 7, 7], 2)[0]


@given(seed=st.integers(0, 2**32), num_pages=st.integers(2, 12))
def test_random_use_keeps_every_page_accounted_for(seed: int, num_pages: int) -> None:
    rng = random.Random(seed)
    book = PageBook(num_pages, 1)
    held: list[tuple[list[int], list[bytes]]] = []
    for _ in range(40):
        action = rng.choice(["take", "take", "release", "publish", "forget"])
        if action == "take":
            digests = chain([rng.randrange(2) for _ in range(rng.randint(1, 4))], 1)
            matched = book.match(digests)
            missing = len(digests) - len(matched)
            if missing > book.num_free - book.num_idle(matched):
                continue
            book.hold(matched)
            held.append(([*matched, *taken(book, missing)], digests))
        elif held:
            pages, digests = rng.choice(held)
            if action == "release":
                book.release(pages)
                held.remove((pages, digests))
            elif action == "publish":
                for page, digest in zip(pages, digests, strict=True):
                    book.publish(page, digest)
            else:
                book.forget(pages)
        book.check_integrity([pages for pages, _ in held])
    for pages, _ in held:
        book.release(pages)
    assert book.num_free == book.num_usable


def test_check_integrity_sees_a_leak_and_a_double_use() -> None:
    book = PageBook(4, 1)
    pages = taken(book, 2)
    with pytest.raises(AssertionError):
        book.check_integrity([])
    with pytest.raises(AssertionError):
        book.check_integrity([pages, pages])
