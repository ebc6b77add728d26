"""The names that tools made for vLLM read (docs/metrics.md lists who reads which), from the values of our own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX = "vllm:"

COPIES: Mapping[str, str] = {
    "num_requests_running": "requests_running",
    "num_requests_waiting": "requests_waiting",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generated_tokens",
    "prefix_cache_queries": "prefix_cache_query_tokens",
    "prefix_cache_hits": "prefix_cache_hit_tokens",
    "gpu_prefix_cache_queries": "prefix_cache_query_tokens",
    "gpu_prefix_cache_hits": "prefix_cache_hit_tokens",
    "prompt_tokens_cached": "cached_prompt_tokens",
    "num_preemptions": "preemptions",
    "iteration_tokens_total": "step_tokens",
    "request_success": "requests",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generated_tokens",
    "request_max_num_generation_tokens": "request_longest_generated_tokens",
    "request_prefill_kv_computed_tokens": "request_computed_prompt_tokens",
    "request_params_max_tokens": "request_max_tokens",
    "request_params_n": "request_n",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_seconds",
    "time_per_output_token_seconds": "inter_token_seconds",
    "request_time_per_output_token_seconds": "time_per_output_token_seconds",
    "e2e_request_latency_seconds": "request_duration_seconds",
    "request_queue_time_seconds": "request_queue_seconds",
    "request_prefill_time_seconds": "request_prefill_seconds",
    "request_decode_time_seconds": "request_decode_seconds",
    "request_inference_time_seconds": "request_inference_seconds",
    "spec_decode_num_drafts": "spec_drafts",
    "spec_decode_num_draft_tokens": "spec_draft_tokens",
    "spec_decode_num_accepted_tokens": "spec_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos": "spec_accepted_tokens_per_depth",
}
"""Alias to our family, both without prefix; a counter's names without _total (`iteration_tokens_total` is none)."""


class VllmAliases(Collector):
    """Renders the aliases at scrape time: nothing is counted twice. Owns nothing but the labels they all carry."""

    def __init__(self, families: Mapping[str, Collector], model: str, page_size: int) -> None:
        """`families` are ours, by their names without prefix."""
        self._families = families
        self._labels = {"model_name": model, "engine": "0"}
        self._page_size = page_size

    def collect(self) -> Iterable[Metric]:
        """Every alias, as its source stands; then those that we do not have as such."""
        for alias, name in COPIES.items():
            yield self._copy(alias, name)
        yield from self._split()
        free, total = self._value("kv_pages_free"), self._value("kv_pages_total")
        used = 1.0 - free / total if total else 0.0
        yield self._gauge("kv_cache_usage_perc", "K/V pages in use, 1 is all of them.", used)
        yield self._gauge("gpu_cache_usage_perc", "The older name of kv_cache_usage_perc.", used)
        hits, queries = self._value("prefix_cache_hit_tokens"), self._value("prefix_cache_query_tokens")
        rate = hits / queries if queries else 0.0
        yield self._gauge("gpu_prefix_cache_hit_rate", "Prompt tokens that the prefix cache answered, 1 is all.", rate)
        sizes = {"block_size": str(self._page_size), "num_gpu_blocks": str(int(total))}
        yield self._gauge("cache_config_info", "Size of the K/V pool; always 1.", 1.0, sizes)

    def _split(self) -> Iterator[Metric]:
        """Values by where they come from, of which we know one part and have nothing of the others."""
        waiting = {"capacity": self._value("requests_waiting"), "deferred": 0.0}
        family = Metric(
            PREFIX + "num_requests_waiting_by_reason", "Requests that wait: here always for a row.", "gauge"
        )
        for reason, value in waiting.items():
            family.add_sample(family.name, {**self._labels, "reason": reason}, value)
        yield family
        prompt, cached = self._value("prompt_tokens"), self._value("cached_prompt_tokens")
        sources = {"local_compute": prompt - cached, "local_cache_hit": cached, "external_kv_transfer": 0.0}
        family = Metric(
            PREFIX + "prompt_tokens_by_source", "Prompt tokens, computed and found in the cache.", "counter"
        )
        for source, value in sources.items():
            family.add_sample(f"{family.name}_total", {**self._labels, "source": source}, value)
        yield family

    def _copy(self, alias: str, name: str) -> Metric:
        (family,) = self._families[name].collect()
        copy = Metric(PREFIX + alias, f"foretoken_{name}: {family.documentation}", family.type)
        for sample in family.samples:
            labels = self._labels | dict(_relabelled(sample.labels))
            copy.add_sample(PREFIX + alias + sample.name.removeprefix(family.name), labels, sample.value)
        return copy

    def _gauge(self, alias: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
        family = Metric(PREFIX + alias, text, "gauge")
        family.add_sample(PREFIX + alias, {**self._labels, **(labels or {})}, value)
        return family

    def _value(self, name: str) -> float:
        (family,) = self._families[name].collect()
        return float(family.samples[0].value)


def _relabelled(labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Our labels as vLLM calls them: position 0 is the first draft token, which stands at depth 1 of a tree."""
    for label, value in labels.items():
        if label == "depth":
            yield "position", str(int(value) - 1)
        elif label == "finish_reason":
            yield "finished_reason", value
        else:
            yield label, value
