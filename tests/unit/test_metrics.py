"""Prometheus names and what feeds them."""

from __future__ import annotations

import msgspec
import pytest

from drafters.base import Source
from server.messages import Ready, SpeculationRecord, StepStats
from server.metrics import EngineState, Metrics, RequestRecord, ServerFacts


def stats(**changes: object) -> StepStats:
    values: dict[str, object] = {
        "num_rows": 2,
        "num_waiting": 5,
        "num_running": 3,
        "num_chunk_tokens": 7,
        "num_nodes": 20,
        "num_drafts": 2,
        "num_draft_tokens": 18,
        "num_accepted": 6,
        "num_won": 8,
        "accepted_by_depth": (2, 2, 1, 1),
        "accepted_by_source": (0, 4, 2, 0, 0),
        "drafted_by_source": (0, 10, 8, 0, 0),
        "pages_free": 30,
        "pages_total": 64,
        "num_preempted": 1,
        "num_prefix_hit_tokens": 16,
        "num_prefix_query_tokens": 40,
        "num_drafter_failures": 1,
        "plan_s": 0.001,
        "draft_s": 0.002,
        "verify_s": 0.003,
        "commit_s": 0.004,
        "forward_s": 0.0025,
    }
    return StepStats(**{**values, **changes})  # type: ignore[arg-type]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"foretoken_{name}", labels)


def test_steps_add_up() -> None:
    metrics = Metrics()
    metrics.observe_step(stats())
    metrics.observe_step(stats(num_running=1, pages_free=10))
    expected = {
        "steps_total": 2,
        "requests_running": 1,
        "requests_waiting": 5,
        "prefill_tokens_total": 14,
        "tree_nodes_total": 40,
        "spec_drafts_total": 4,
        "spec_draft_tokens_total": 36,
        "spec_accepted_tokens_total": 12,
        "kv_pages_free": 10,
        "kv_pages_total": 64,
        "preemptions_total": 2,
        "step_tokens_sum": 30,
        "step_tokens_count": 2,
        "prefix_cache_hit_tokens_total": 32,
        "prefix_cache_query_tokens_total": 80,
        "drafter_failures_total": 2,
    }
    assert {name: value(metrics, name) for name in expected} == expected
    assert value(metrics, "spec_accepted_tokens_per_depth_total", depth="1") == 4
    assert value(metrics, "spec_accepted_tokens_per_depth_total", depth="4") == 2
    trigram, suffix = Source.TRIGRAM.name.lower(), Source.SUFFIX.name.lower()
    assert value(metrics, "spec_draft_tokens_per_source_total", source=trigram) == 20
    assert value(metrics, "spec_accepted_tokens_per_source_total", source=suffix) == 4
    assert value(metrics, "step_phase_seconds_sum", phase="verify") == 0.006
    assert value(metrics, "step_phase_seconds_sum", phase="forward") == 0.005


def test_new_counts_of_steps_add_up() -> None:
    metrics = Metrics()
    told = {"drafters_s": {"hybrid": 0.002}, "decode_s": 0.01, "plain_s": 0.015, "drafted_by_depth": (9, 6, 2, 1)}
    metrics.observe_step(stats(**told))
    metrics.observe_step(stats(**told, num_bypassed=2))
    metrics.observe_step(stats(num_bypassed=2, num_drafts=0, num_nodes=2))
    assert value(metrics, "drafter_seconds_total", drafter="hybrid") == 0.004
    assert value(metrics, "spec_decode_seconds_total") == 0.02
    assert value(metrics, "spec_plain_seconds_total") == 0.03
    assert value(metrics, "spec_draft_tokens_per_depth_total", depth="2") == 12
    assert value(metrics, "spec_bypassed_rows_total") == 4
    assert value(metrics, "spec_bypassed_steps_total") == 1
    assert value(metrics, "step_tree_nodes_sum") == 42
    assert value(metrics, "step_tree_nodes_bucket", le="2") == 1
    assert value(metrics, "step_tree_nodes_bucket", le="24") == 3


def test_what_ran_no_rows_was_no_step() -> None:
    metrics = Metrics()
    metrics.observe_step(stats(num_rows=0, num_running=0, num_waiting=0, pages_free=64))
    assert value(metrics, "steps_total") == 0
    assert value(metrics, "step_phase_seconds_count", phase="plan") == 0
    assert value(metrics, "kv_pages_free") == 64


FACTS = ServerFacts(version="1.2", model="m", drafter="hybrid", max_rows=8, page_size=16, has_vllm_aliases=True)
READY = Ready(256, 50, ("none", "hybrid"), "cpu", "float32", 63, {"hybrid": {"texts": 1000}})


def sample(metrics: Metrics, has_worker: bool) -> None:
    metrics.sample_engine(EngineState(num_running=0, num_waiting=0, num_restarts=0, has_worker=has_worker))


def test_a_worker_comes_and_goes() -> None:
    metrics = Metrics()
    metrics.describe(FACTS)
    sample(metrics, has_worker=False)
    assert value(metrics, "worker_up") == 0
    assert value(metrics, "max_rows") == 8
    metrics.worker_ready(READY)
    assert value(metrics, "worker_up") == 1
    assert value(metrics, "kv_pages_free") == 63
    assert value(metrics, "drafter_bytes", drafter="hybrid", part="texts") == 1000
    assert value(metrics, "drafter_seconds_total", drafter="hybrid") == 0
    labels = {"version": "1.2", "model": "m", "device": "cpu", "dtype": "float32", "drafter": "hybrid", "backend": ""}
    assert value(metrics, "info", **labels) == 1
    metrics.observe_step(stats(pages_free=3, pages_total=63, drafter_bytes={"hybrid": {"texts": 2000}}))
    assert value(metrics, "kv_pages_free") == 3
    assert value(metrics, "drafter_bytes", drafter="hybrid", part="texts") == 2000
    sample(metrics, has_worker=False)
    assert value(metrics, "worker_up") == 0
    assert value(metrics, "kv_pages_free") == 63
    metrics.worker_ready(msgspec.structs.replace(READY, device="cuda"))
    assert value(metrics, "info", **labels) is None
    assert value(metrics, "info", **{**labels, "device": "cuda"}) == 1


def test_a_burst_counts_by_its_tokens() -> None:
    metrics = Metrics()
    metrics.tokens_came(0.012, 4)
    metrics.tokens_came(0.2, 1)
    assert value(metrics, "inter_token_seconds_count") == 5
    assert value(metrics, "inter_token_seconds_sum") == pytest.approx(0.212)
    assert value(metrics, "inter_token_seconds_bucket", le="0.005") == 4
    assert value(metrics, "inter_token_seconds_bucket", le="0.2") == 5
    assert value(metrics, "inter_token_seconds_bucket", le="+Inf") == 5


def test_requests_add_up() -> None:
    metrics = Metrics()
    record = SpeculationRecord(num_steps=2, num_draft_tokens=9, num_accepted_tokens=3, histogram=(0, 1, 1))
    timed = RequestRecord(
        finish_reason="stop",
        num_prompt=10,
        num_generated=5,
        tpot_s=0.004,
        e2e_s=0.036,
        max_tokens=20,
        num_cached=4,
        prefill_s=0.013,
        decode_s=0.016,
        speculation=record,
    )
    metrics.first_token_came(0.02, 0.007)
    metrics.first_token_came(0.03, None)
    metrics.request_ended(timed)
    metrics.request_ended(RequestRecord(finish_reason="abort", num_prompt=1, num_generated=0, tpot_s=None, e2e_s=0.5))
    assert value(metrics, "requests_total", finish_reason="stop") == 1
    assert value(metrics, "requests_total", finish_reason="abort") == 1
    assert value(metrics, "prompt_tokens_total") == 11
    assert value(metrics, "generated_tokens_total") == 5
    assert value(metrics, "time_to_first_token_seconds_count") == 2
    assert value(metrics, "time_per_output_token_seconds_sum") == 0.004
    assert value(metrics, "request_duration_seconds_count") == 2
    assert value(metrics, "request_queue_seconds_sum") == 0.007
    assert value(metrics, "request_queue_seconds_count") == 1
    assert value(metrics, "spec_acceptance_length_sum") == 2.5
    assert value(metrics, "spec_acceptance_length_count") == 1
    assert value(metrics, "request_prompt_tokens_sum") == 11
    assert value(metrics, "cached_prompt_tokens_total") == 4
    assert value(metrics, "request_computed_prompt_tokens_sum") == 7
    assert value(metrics, "request_max_tokens_bucket", le="20.0") == 2
    assert value(metrics, "request_prefill_seconds_sum") == 0.013
    assert value(metrics, "request_decode_seconds_count") == 1, "the other one had no token"
    assert value(metrics, "request_inference_seconds_sum") == pytest.approx(0.029)
    assert value(metrics, "request_generated_tokens_bucket", le="5.0") == 2


def test_prompts_are_counted_by_source_under_the_names_of_vllm() -> None:
    metrics = Metrics()
    metrics.describe(FACTS)
    ended = {"finish_reason": "stop", "num_generated": 1, "tpot_s": None, "e2e_s": 1.0}
    metrics.request_ended(RequestRecord(num_prompt=10, num_cached=4, **ended))  # type: ignore[arg-type]
    metrics.observe_step(stats(num_waiting=5))
    labels = {"model_name": "m", "engine": "0"}
    found = {
        source: metrics.registry.get_sample_value("vllm:prompt_tokens_by_source_total", {**labels, "source": source})
        for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
    }
    assert found == {"local_compute": 6, "local_cache_hit": 4, "external_kv_transfer": 0}
    reasons = ("capacity", "deferred")
    waiting = [
        metrics.registry.get_sample_value("vllm:num_requests_waiting_by_reason", {**labels, "reason": reason})
        for reason in reasons
    ]
    assert waiting == [5, 0]
    assert metrics.registry.get_sample_value("vllm:iteration_tokens_total_sum", labels) == 15


def test_every_series_is_there_from_the_start() -> None:
    text = Metrics().render().decode()
    for line in (
        'foretoken_requests_total{finish_reason="error"} 0.0',
        'foretoken_spec_accepted_tokens_per_source_total{source="ctc"} 0.0',
        'foretoken_spec_accepted_tokens_per_depth_total{depth="63"} 0.0',
        "foretoken_worker_restarts_total 0.0",
        'foretoken_http_requests_total{route="/v1/completions",status="503"} 0.0',
    ):
        assert line in text


def test_restarts_are_counted_once() -> None:
    metrics = Metrics()
    for running, waiting, restarts in ((1, 2, 3), (0, 0, 3), (0, 0, 4)):
        metrics.sample_engine(
            EngineState(num_running=running, num_waiting=waiting, num_restarts=restarts, has_worker=True)
        )
    assert value(metrics, "worker_restarts_total") == 4
    assert value(metrics, "requests_running") == 0


def test_two_apps_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.observe_step(stats())
    assert value(second, "steps_total") == 0
