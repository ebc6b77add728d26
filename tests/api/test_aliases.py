"""The names of vLLM, read the way the tools that know them read: from a real server's /metrics, before and after."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.house import make_house
from tests.api.process import DEMO, serving

LABELS = 'engine="0",model_name="foretoken-demo"'
NUM_REQUESTS = 6


@dataclass
class Counts:
    """What `vllm bench serve` takes from one scrape."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    accepted_by_position: dict[int, int] = field(default_factory=dict)


def bench_counts(text: str) -> Counts:
    """Line by line, by what a name contains, the last word is the value: a reader that knows no exposition format."""
    counts = Counts()
    for line in text.splitlines():
        name = line.partition("{")[0]
        if not line.startswith("vllm:spec_decode") or not name.endswith("_total"):
            continue
        value = int(float(line.split()[-1]))
        if "num_drafts" in line:
            counts.num_drafts += value
        elif "num_draft_tokens" in line:
            counts.num_draft_tokens += value
        elif "num_accepted_tokens_per_pos" in line:
            position = int(line.split('position="')[1].split('"')[0])
            counts.accepted_by_position[position] = counts.accepted_by_position.get(position, 0) + value
        elif "num_accepted_tokens" in line:
            counts.num_accepted += value
    return counts


def series(text: str) -> dict[str, float]:
    """Every sample by name and labels."""
    found = (re.fullmatch(r"([^#\s]\S*(?:\{.*\})?) (\S+)", line) for line in text.splitlines())
    return {match[1]: float(match[2]) for match in found if match}


@pytest.fixture(scope="module")
def scrapes() -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """/metrics before and after some answers of the demo model, and what each answer said of its speculation."""
    with serving(*DEMO, "--max-num-seqs", "4") as url:
        metrics = url.removesuffix("/v1") + "/metrics"
        before = httpx.get(metrics).text

        def ask(index: int) -> dict[str, Any]:
            body = {
                "model": "foretoken-demo",
                "messages": [{"role": "user", "content": f"I want a table for {index + 2} tonight, what do you have?"}],
                "max_tokens": 64,
                "seed": index,
                "speculative": {"metrics": True},
            }
            answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            answers = list(pool.map(ask, range(NUM_REQUESTS)))
        yield before, httpx.get(metrics).text, answers


def test_vllm_bench_serve_finds_our_acceptance(scrapes: tuple[str, str, list[dict[str, Any]]]) -> None:
    first, last = bench_counts(scrapes[0]), bench_counts(scrapes[1])
    told = [answer["metrics"]["speculative_decoding"] for answer in scrapes[2]]
    num_drafts, num_accepted = last.num_drafts - first.num_drafts, last.num_accepted - first.num_accepted
    assert num_drafts == sum(one["num_spec_steps"] for one in told) > 0
    assert num_accepted == sum(one["num_accepted_draft_tokens"] for one in told) > 0
    assert last.num_draft_tokens - first.num_draft_tokens == sum(one["num_draft_tokens"] for one in told)
    ours = series(scrapes[1])
    length = 1 + ours["foretoken_spec_accepted_tokens_total"] / ours["foretoken_spec_drafts_total"]
    assert 1 + num_accepted / num_drafts == pytest.approx(length)
    # A position that appeared only later would be compared with nothing.
    assert sorted(first.accepted_by_position) == sorted(last.accepted_by_position) == list(range(63))
    won = [last.accepted_by_position[place] - first.accepted_by_position[place] for place in range(63)]
    assert sum(won) == num_accepted
    reached = [sum(sum(one["acceptance_histogram"][place + 1 :]) for one in told) for place in range(63)]
    assert won == reached


def test_aiperf_finds_our_acceptance(scrapes: tuple[str, str, list[dict[str, Any]]]) -> None:
    found = series(scrapes[1])
    accepted, drafts = (
        found[f"vllm:spec_decode_{name}_total{{{LABELS}}}"] for name in ("num_accepted_tokens", "num_drafts")
    )
    told = [answer["metrics"]["speculative_decoding"] for answer in scrapes[2]]
    steps = sum(one["num_spec_steps"] for one in told)
    mean = sum(one["mean_acceptance_length"] * one["num_spec_steps"] for one in told) / steps
    assert accepted / drafts + 1 == pytest.approx(mean)
    assert found["foretoken_spec_acceptance_length_count"] == sum(one["num_spec_steps"] > 0 for one in told)


def test_routers_and_scalers_find_their_names(scrapes: tuple[str, str, list[dict[str, Any]]]) -> None:
    found = series(scrapes[1])
    values = {
        name: found[f"vllm:{name}{{{LABELS}}}"]
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "gpu_prefix_cache_hit_rate",
            "gpu_prefix_cache_hits_total",
            "gpu_prefix_cache_queries_total",
            "gpu_cache_usage_perc",
            "kv_cache_usage_perc",
        )
    }
    assert values["num_requests_running"] == values["num_requests_waiting"] == 0
    assert values["gpu_cache_usage_perc"] == values["kv_cache_usage_perc"]
    hits, queries = values["gpu_prefix_cache_hits_total"], values["gpu_prefix_cache_queries_total"]
    assert 0 < queries == found["foretoken_prefix_cache_query_tokens_total"]
    assert values["gpu_prefix_cache_hit_rate"] == hits / queries
    success = 'vllm:request_success_total{{engine="0",finished_reason="{}",model_name="foretoken-demo"}}'
    assert sum(found[success.format(reason)] for reason in ("stop", "length")) == NUM_REQUESTS
    answers = scrapes[2]
    for name, field_ in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "completion_tokens")):
        assert found[f"vllm:{name}_total{{{LABELS}}}"] == sum(answer["usage"][field_] for answer in answers)


@pytest.mark.parametrize(
    ("alias", "ours"),
    [
        ("time_to_first_token_seconds", "time_to_first_token_seconds"),
        ("inter_token_latency_seconds", "inter_token_seconds"),
        ("request_time_per_output_token_seconds", "time_per_output_token_seconds"),
        ("e2e_request_latency_seconds", "request_duration_seconds"),
        ("request_queue_time_seconds", "request_queue_seconds"),
        ("request_prefill_time_seconds", "request_prefill_seconds"),
        ("request_decode_time_seconds", "request_decode_seconds"),
        ("request_inference_time_seconds", "request_inference_seconds"),
        ("iteration_tokens_total", "step_tokens"),
    ],
)
def test_histograms_are_ours(scrapes: tuple[str, str, list[dict[str, Any]]], alias: str, ours: str) -> None:
    found = series(scrapes[1])
    assert found[f"foretoken_{ours}_count"] >= NUM_REQUESTS
    for part in ("count", "sum"):
        assert found[f"vllm:{alias}_{part}{{{LABELS}}}"] == found[f"foretoken_{ours}_{part}"]
    prefix = f"foretoken_{ours}_bucket{{le="
    buckets = {name.removeprefix(prefix)[:-1]: value for name, value in found.items() if name.startswith(prefix)}
    bucket = f'vllm:{alias}_bucket{{{{engine="0",le={{}},model_name="foretoken-demo"}}}}'
    assert {edge: found[bucket.format(edge)] for edge in buckets} == buckets
    assert len(buckets) > 10


def test_times_and_tokens_of_requests_are_those_of_the_answers(scrapes: tuple[str, str, list[dict[str, Any]]]) -> None:
    found, answers = series(scrapes[1]), scrapes[2]

    def sum_of(name: str) -> float:
        return found[f"vllm:{name}_sum{{{LABELS}}}"]

    phases = [sum_of(f"request_{name}_time_seconds") for name in ("queue", "prefill", "decode")]
    assert all(phase > 0 for phase in phases)
    assert sum_of("request_inference_time_seconds") == pytest.approx(phases[1] + phases[2])
    assert sum(phases) == pytest.approx(sum_of("e2e_request_latency_seconds"), rel=0.1)
    assert sum_of("request_params_max_tokens") == 64 * NUM_REQUESTS
    assert sum_of("request_params_n") == NUM_REQUESTS
    longest = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert sum_of("request_max_num_generation_tokens") == longest
    cached = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    prompt = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert found[f"vllm:prompt_tokens_cached_total{{{LABELS}}}"] == cached
    assert sum_of("request_prefill_kv_computed_tokens") == prompt - cached
    # Steps after the ends of answers win nothing; those of the trial requests are not told.
    assert sum_of("iteration_tokens_total") >= longest + prompt - cached


def test_nothing_of_a_served_model_stays_at_zero(scrapes: tuple[str, str, list[dict[str, Any]]]) -> None:
    found = series(scrapes[1])
    for name in (
        "foretoken_worker_up",
        "foretoken_max_rows",
        "foretoken_kv_pages_total",
        "foretoken_spec_decode_seconds_total",
        "foretoken_spec_plain_seconds_total",
        "foretoken_step_tree_nodes_count",
        "foretoken_request_queue_seconds_sum",
        "foretoken_inter_token_seconds_count",
        'foretoken_spec_draft_tokens_per_depth_total{depth="1"}',
        'foretoken_drafter_seconds_total{drafter="hybrid"}',
        'foretoken_drafter_bytes{drafter="trigram",part="table"}',
        'foretoken_drafter_bytes{drafter="ctc",part="head"}',
    ):
        assert found[name] > 0, name
    assert sum(name.startswith("foretoken_info{") for name in found) == 1
    drafted = sum(value for name, value in found.items() if name.startswith("foretoken_spec_draft_tokens_per_depth"))
    assert drafted == found["foretoken_spec_draft_tokens_total"]


def test_aliases_can_be_turned_off(tmp_path: Path) -> None:
    assert "vllm:" in make_house(tmp_path / "on").get("/metrics").text
    text = make_house(tmp_path / "off", metrics_vllm_aliases=False).get("/metrics").text
    assert "vllm:" not in text
    assert "foretoken_spec_drafts_total" in text
