"""Who is here, on which row, with which pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from server.messages import RequestError, Submit
from server.worker.pages import PageBook
from server.worker.sequence import Sequence, Status
from verifier.plan import RowStart

if TYPE_CHECKING:
    from server.worker.constraint import RowConstraint


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the verifier and the settings allow."""

    max_rows: int
    max_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    has_prefix_cache: bool = True

    @property
    def context_len(self) -> int:
        """Longest sequence that can always be served: with all pages to itself, it fits."""
        return min(self.max_model_len, (self.num_pages - 1) * self.page_size)


@dataclass(slots=True)
class Changes:
    """What the verifier must be told with the next plan."""

    starts: list[RowStart] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    pages: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class Counts:
    """What happened on the roster since the last plan began, for the metrics."""

    num_preempted: int = 0
    num_prefix_hit_tokens: int = 0
    num_prefix_query_tokens: int = 0


class Roster:
    """Gives rows and pages to sequences and takes them back; the scheduler decides whose turn it is.

    Owns the waiting and running sequences, the rows and the page book.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.book = PageBook(limits.num_pages, limits.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.counts = Counts()
        self._by_id: dict[str, Sequence] = {}
        self._by_row: list[Sequence | None] = [None] * limits.max_rows
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._num_arrived = 0
        self._changes = Changes()
        self._vacated: list[int] = []

    @property
    def has_free_row(self) -> bool:
        """Whether one more sequence could run."""
        return bool(self._free_rows)

    def sequence(self, row: int) -> Sequence:
        """The sequence that lives in `row`."""
        sequence = self._by_row[row]
        assert sequence is not None, f"row {row} is empty"
        return sequence

    def occupant(self, row: int) -> Sequence | None:
        """The sequence that lives in `row`, if any."""
        return self._by_row[row]

    def take_changes(self) -> Changes:
        """What the verifier has not been told yet; the caller tells it."""
        changes, self._changes = self._changes, Changes()
        return changes

    def take_vacated(self) -> list[int]:
        """Rows whose sequence left since the last call: finished, failed, aborted or preempted."""
        vacated, self._vacated = self._vacated, []
        return vacated

    # ---- coming

    def submit(self, submit: Submit, constraint: RowConstraint | None = None) -> RequestError | None:
        """Queue a request; an error if it could never run."""
        limit = self.limits.context_len
        sequence = Sequence(submit, self._num_arrived, limit, constraint)
        if submit.id in self._by_id:
            return RequestError(submit.id, f"a request with id {submit.id} is already running")
        if sequence.num_prompt == 0:
            return RequestError(submit.id, "the prompt is empty")
        if sequence.num_left <= 0:
            message = f"{len(sequence.tokens)} tokens leave no room for an answer: "
            return RequestError(submit.id, message + f"the context that fits the model and its K/V memory is {limit}")
        self._num_arrived += 1
        self._by_id[submit.id] = sequence
        self.waiting.append(sequence)
        return None

    def seat(self, sequence: Sequence) -> bool:
        """Give the first of the queue a row and the pages of all its known tokens; False if it must wait."""
        assert sequence is self.waiting[0], f"{sequence.id} jumps the queue"
        book, size, length = self.book, self.limits.page_size, len(sequence.tokens)
        matched: list[int] = []
        if self.limits.has_prefix_cache and not sequence.is_scored:
            # The last token always runs: its logits are what the answer needs.
            matched = book.match(sequence.page_digests((length - 1) // size, size))
        num_missing = (length - 1) // size + 1 - len(matched)
        # One page in reserve for every running row, else the newcomer would soon be preempted again.
        if num_missing + len(self.running) > book.num_free - book.num_idle(matched):
            return False
        book.hold(matched)
        pages = book.take(num_missing)
        assert pages is not None, f"{num_missing} pages were free a moment ago"
        self.waiting.popleft()
        self.running.append(sequence)
        row = sequence.row = self._free_rows.pop()
        self._by_row[row] = sequence
        sequence.status = Status.PREFILLING
        sequence.num_cached = len(matched) * size
        sequence.num_published = len(matched)
        if sequence.seated_s is None:
            sequence.seated_s = perf_counter()
        self._changes.starts.append(RowStart(row, tuple(sequence.tokens), sequence.num_prompt, sequence.sampling))
        self.append_pages(sequence, [*matched, *pages])
        self.counts.num_prefix_query_tokens += length
        self.counts.num_prefix_hit_tokens += sequence.num_cached
        if sequence.num_cached_prompt is None:
            sequence.num_cached_prompt = min(sequence.num_cached, sequence.num_prompt)
        return True

    def append_pages(self, sequence: Sequence, pages: list[int]) -> None:
        """Make room for more positions of a running sequence."""
        index = len(sequence.pages)
        for page in pages:
            self._changes.pages.append((sequence.row, index, page))
            index += 1
        sequence.pages += pages

    def reclaim_slack(self) -> None:
        """Take back the pages that rows hold beyond their roots for the sake of wider trees."""
        for sequence in self.running:
            if sequence.status is Status.GENERATING:
                needed = sequence.num_cached // self.limits.page_size + 1
                self.book.release(sequence.pages[needed:])
                del sequence.pages[needed:]

    def publish(self, sequence: Sequence) -> None:
        """Name the pages that are now completely written, so that later prompts can use them."""
        size = self.limits.page_size
        num_full = sequence.num_cached // size
        if sequence.num_published >= num_full or not self.limits.has_prefix_cache:
            return
        digests = sequence.page_digests(num_full, size)
        for index in range(sequence.num_published, num_full):
            self.book.publish(sequence.pages[index], digests[index])
        sequence.num_published = num_full

    # ---- leaving

    def abort(self, request_id: str) -> bool:
        """Drop a request wherever it stands; its pages are free at once. False if it is not here."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
            del self._by_id[request_id]
            sequence.status = Status.FINISHED
        else:
            self.leave(sequence)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Send a row back to the front of the queue; its tokens stay, its pages go."""
        row = sequence.row
        self._vacate(sequence)
        self._changes.pages = [write for write in self._changes.pages if write[0] != row]
        sequence.status = Status.WAITING
        self.waiting.appendleft(sequence)
        self.counts.num_preempted += 1

    def leave(self, sequence: Sequence) -> None:
        """A running sequence is done."""
        self._vacate(sequence)
        del self._by_id[sequence.id]
        sequence.status = Status.FINISHED

    def fail(self, row: int, reason: str) -> RequestError:
        """End a row whose numbers went bad; nothing it wrote may answer anyone else's prompt."""
        sequence = self.sequence(row)
        self.book.forget(sequence.pages)
        self.leave(sequence)
        return RequestError(sequence.id, reason)

    def free_rows(self, rows: Many[int]) -> None:
        """Tell the verifier with the next plan that these rows, which no sequence lives in, are free again."""
        assert not any(self._by_row[row] for row in rows), "somebody lives there"
        self._changes.stops += rows

    def _vacate(self, sequence: Sequence) -> None:
        self.book.release(sequence.pages)
        sequence.pages.clear()
        sequence.num_cached = sequence.num_published = 0
        self.running.remove(sequence)
        self._by_row[sequence.row] = None
        self._free_rows.append(sequence.row)
        self._changes.stops.append(sequence.row)
        self._vacated.append(sequence.row)
        sequence.row = -1

    def check_integrity(self) -> None:
        """Assert that pages, rows, queue and the invariants of every sequence agree."""
        self.book.check_integrity([sequence.pages for sequence in self._by_id.values()])
        for row, seated in enumerate(self._by_row):
            assert (seated is None) == (row in self._free_rows), f"row {row}"
            assert seated is None or seated.row == row, f"row {row} holds a sequence of row {seated and seated.row}"
        for sequence in self._by_id.values():
            assert (sequence.status is Status.WAITING) == (sequence in self.waiting), sequence.id
            assert (sequence.row >= 0) == (sequence in self.running), sequence.id
            assert sequence.num_cached <= len(sequence.pages) * self.limits.page_size, sequence.id
            if sequence.status is Status.GENERATING:
                length = len(sequence.tokens)
                assert sequence.num_cached == length - 1, f"{sequence.num_cached} cached of {length}"
        arrivals = [sequence.arrival for sequence in [*self.running, *self.waiting]]
        assert arrivals == sorted(arrivals), f"not first come first served: {arrivals}"
        assert len(arrivals) == len(self._by_id), "a sequence is lost"
