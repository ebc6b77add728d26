"""The metrics of steps and of speculation, fed by what the worker tells of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import Counter

from drafters.base import Source
from server.messages import Ready, StepStats
from server.metric_families import Families
from verifier.plan import MAX_TREE_NODES

_PHASE_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
_NODES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)


class StepMetrics:
    """Owns every metric that a step of the worker changes; labels are resolved once."""

    def __init__(self, families: Families) -> None:
        self._make_steps(families)
        self._make_drafts(families)
        self._make_drafters(families)

    def _make_steps(self, make: Families) -> None:
        self._steps = make.counter("steps", "Steps of the worker.")
        self.running = make.gauge("requests_running", "Requests that run.")
        self.waiting = make.gauge("requests_waiting", "Requests that wait for a row.")
        self._chunk_tokens = make.counter("prefill_tokens", "Prompt tokens run through the model.")
        self._nodes = make.counter("tree_nodes", "Tree nodes verified, roots included.")
        self._nodes_of_step = make.weighted_histogram(
            "step_tree_nodes", "Tree nodes of a step, roots included, of steps that have trees.", _NODES
        )
        self._tokens_of_step = make.weighted_histogram(
            "step_tokens", "Prompt tokens read and answer tokens won in a step.", _STEP_TOKENS
        )
        self._pages_free = make.gauge("kv_pages_free", "K/V pages that are free.")
        self._pages_total = make.gauge("kv_pages_total", "K/V pages of the pool.")
        self._num_pages = 0
        self._preempted = make.counter("preemptions", "Rows that lost their pages and are recomputed.")
        self._prefix_hits = make.counter("prefix_cache_hit_tokens", "Prompt tokens answered by the prefix cache.")
        self._prefix_queries = make.counter("prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache.")
        phases = make.histogram(
            "step_phase_seconds",
            "Duration of one phase of a step; forward is the model's part of verify.",
            _PHASE_S,
            ("phase",),
        )
        self._phases = tuple(phases.labels(phase) for phase in ("plan", "draft", "verify", "commit", "forward"))

    def _make_drafts(self, make: Families) -> None:
        self._drafts = make.counter("spec_drafts", "Trees verified that held at least one draft token.")
        self._bypassed = make.counter(
            "spec_bypassed_rows", "Times a row that could draft decoded plainly, because drafting would not pay."
        )
        self._bypassed_steps = make.counter(
            "spec_bypassed_steps", "Steps in which rows could draft and none did, because drafting would not pay."
        )
        self._decode_s = make.counter(
            "spec_decode_seconds", "Time of steps without prompt chunks, once the cost of plain steps is known."
        )
        self._plain_s = make.counter(
            "spec_plain_seconds", "What the tokens of those same steps would have cost without speculation."
        )
        self._draft_tokens = make.counter("spec_draft_tokens", "Draft tokens verified.")
        self._accepted = make.counter("spec_accepted_tokens", "Draft tokens accepted.")
        drafted = make.counter(
            "spec_draft_tokens_per_depth", "Draft tokens verified, by depth in the tree.", ("depth",)
        )
        accepted = make.counter(
            "spec_accepted_tokens_per_depth", "Draft tokens accepted, by depth in the tree.", ("depth",)
        )
        depths = [str(depth) for depth in range(1, MAX_TREE_NODES)]
        self._drafted_by_depth = tuple(drafted.labels(depth) for depth in depths)
        self._accepted_by_depth = tuple(accepted.labels(depth) for depth in depths)
        drafted = make.counter("spec_draft_tokens_per_source", "Draft tokens verified, by who guessed.", ("source",))
        accepted = make.counter(
            "spec_accepted_tokens_per_source", "Draft tokens accepted, by who guessed.", ("source",)
        )
        names = [source.name.lower() for source in Source if source != Source.ROOT]  # nobody guessed the root
        self._drafted_by_source = tuple(drafted.labels(name) for name in names)
        self._accepted_by_source = tuple(accepted.labels(name) for name in names)

    def _make_drafters(self, make: Families) -> None:
        self._drafter_failures = make.counter("drafter_failures", "Rows whose drafter failed and was replaced.")
        self._drafter_s = make.counter(
            "drafter_seconds", "Time spent drafting and reading news, by drafter.", ("drafter",)
        )
        self._drafter_s_by_name: dict[str, Counter] = {}
        self._drafter_bytes = make.gauge(
            "drafter_bytes", "Memory of a drafter's tables, layers and head.", ("drafter", "part")
        )

    def worker_ready(self, ready: Ready) -> None:
        """A worker has loaded and holds nothing yet."""
        self._num_pages = ready.num_pages
        self._pages_free.set(ready.num_pages)
        self._pages_total.set(ready.num_pages)
        for name in ready.drafters:
            if name != "none":
                self._drafter(name)
        self._set_bytes(ready.drafter_bytes)

    def observe(self, stats: StepStats) -> None:
        """Add what one step of the worker did; without rows it was none, and only tells how things stand."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self._pages_free.set(stats.pages_free)
        self._pages_total.set(stats.pages_total)
        if not stats.num_rows:
            return
        self._steps.inc()
        for counter, amount in (
            (self._chunk_tokens, stats.num_chunk_tokens),
            (self._nodes, stats.num_nodes),
            (self._drafts, stats.num_drafts),
            (self._bypassed, stats.num_bypassed),
            (self._bypassed_steps, bool(stats.num_bypassed and not stats.num_drafts)),
            (self._decode_s, stats.decode_s),
            (self._plain_s, stats.plain_s),
            (self._draft_tokens, stats.num_draft_tokens),
            (self._accepted, stats.num_accepted),
            (self._preempted, stats.num_preempted),
            (self._prefix_hits, stats.num_prefix_hit_tokens),
            (self._prefix_queries, stats.num_prefix_query_tokens),
            (self._drafter_failures, stats.num_drafter_failures),
        ):
            if amount:
                counter.inc(amount)
        if stats.num_nodes:
            self._nodes_of_step.observe(stats.num_nodes)
        self._tokens_of_step.observe(stats.num_chunk_tokens + stats.num_won)
        self._add_guesses(stats)
        durations = (stats.plan_s, stats.draft_s, stats.verify_s, stats.commit_s, stats.forward_s)
        for phase, duration_s in zip(self._phases, durations, strict=True):
            phase.observe(duration_s)

    def _add_guesses(self, stats: StepStats) -> None:
        _add(self._drafted_by_depth, stats.drafted_by_depth)
        _add(self._accepted_by_depth, stats.accepted_by_depth)
        _add(self._drafted_by_source, stats.drafted_by_source[1:])
        _add(self._accepted_by_source, stats.accepted_by_source[1:])
        for name, spent_s in stats.drafters_s.items():
            self._drafter(name).inc(spent_s)
        if stats.drafter_bytes is not None:
            self._set_bytes(stats.drafter_bytes)

    def _drafter(self, name: str) -> Counter:
        counter = self._drafter_s_by_name.get(name)
        if counter is None:
            counter = self._drafter_s_by_name[name] = self._drafter_s.labels(name)
        return counter

    def _set_bytes(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        for name, parts in sizes.items():
            for part, size in parts.items():
                self._drafter_bytes.labels(name, part).set(size)

    def worker_lost(self) -> None:
        """There is no worker: nobody holds pages."""
        self._pages_free.set(self._num_pages)


def _add(counters: Sequence[Counter], amounts: Sequence[int]) -> None:
    for counter, amount in zip(counters, amounts, strict=False):
        if amount:
            counter.inc(amount)
