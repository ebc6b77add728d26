"""Who holds which page of K/V memory, and which finished pages can answer a prompt prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

TRASH_PAGE = 0
"""Padding positions of a step write here; it is never handed out."""


def tenant_digest(tenant: str) -> bytes:
    """Where the digest chain of a tenant starts: equal prompts of two tenants share no page."""
    return hashlib.blake2b(tenant.encode(), digest_size=16, person=b"foretoken-tenant").digest()


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full page: its tokens and, through `parent`, everything before it.

    BLAKE2b with 128 bits, because a collision would answer with someone else's context.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PageBook:
    """Accounts for the K/V pages 1 .. num_pages - 1.

    A page is free, held (by one sequence or, as part of a shared prefix, by several), or idle: held by
    nobody, but still named in the prefix cache, where it stays until its space is wanted. Held pages
    that are named are never written again. Owns the free list, the reference counts and the prefix cache.
    """

    __slots__ = ("_digests", "_free", "_idle", "_named", "_refs", "num_pages", "page_size")

    def __init__(self, num_pages: int, page_size: int) -> None:
        assert num_pages >= 2, f"{num_pages} pages: the first is reserved"
        assert page_size >= 1, f"page size {page_size}"
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))
        self._refs = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Pages that `take` could hand out now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_usable(self) -> int:
        """Pages that exist for sequences."""
        return self.num_pages - 1

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` pages for writing, held once each; None (and no change) if there are not that many.

        Idle pages are evicted, least recently used first, when the free list is empty.
        """
        if count > self.num_free:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """The longest run of known pages that starts a chain of digests. Nothing is held yet."""
        pages = []
        for digest in digests:
            page = self._named.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` are idle: holding these takes them out of `num_free`."""
        return sum(page in self._idle for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these matched pages."""
        for page in pages:
            if self._refs[page] == 0:
                del self._idle[page]
            self._refs[page] += 1

    def publish(self, page: int, digest: bytes) -> None:
        """Offer a held page, completely written, to later prompts. A second page of one name stays private."""
        assert self._refs[page] > 0, f"page {page} is not held"
        if digest not in self._named and self._digests[page] is None:
            self._named[digest] = page
            self._digests[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page. The last pages of a sequence become the first to be evicted."""
        for page in reversed(pages):
            self._refs[page] -= 1
            assert self._refs[page] >= 0, f"page {page} released twice"
            if self._refs[page] == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def forget(self, pages: Iterable[int]) -> None:
        """Take held pages out of the prefix cache: what was written there cannot be trusted."""
        for page in pages:
            digest = self._digests[page]
            if digest is not None:
                del self._named[digest]
                self._digests[page] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that every page is accounted for exactly once, given the pages of every sequence."""
        refs = [0] * self.num_pages
        for pages in held:
            assert len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}"
            for page in pages:
                refs[page] += 1
        assert refs == self._refs, f"reference counts {self._refs}, held {refs}"
        assert refs[TRASH_PAGE] == 0, "the trash page was handed out"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(1, self.num_pages):
            states = (page in free) + (page in self._idle) + (refs[page] > 0)
            assert states == 1, f"page {page} is in {states} states"
            assert page not in free or self._digests[page] is None, f"free page {page} is named"
            assert page not in self._idle or self._digests[page] is not None, f"idle page {page} has no name"
        named = {digest: page for page, digest in enumerate(self._digests) if digest is not None}
        assert named == self._named, "names and pages disagree"

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        digest = self._digests[page]
        assert digest is not None, f"idle page {page} has no name"
        del self._named[digest]
        self._digests[page] = None
        return page
