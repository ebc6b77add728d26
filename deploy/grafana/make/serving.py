"""The dashboard of serving: what clients see, what is asked, and how much room is left."""

from __future__ import annotations

from deploy.grafana.make.panels import Board, Panel, Query, Row, heatmap, quantiles, stat, steps

S = '{instance=~"$instance"}'
RATE = "[$__rate_interval]"
WON = (
    f"sum(rate(foretoken_tree_nodes_total{S}{RATE})) - sum(rate(foretoken_spec_draft_tokens_total{S}{RATE}))"
    f" + sum(rate(foretoken_spec_accepted_tokens_total{S}{RATE}))"
    f" + sum(rate(foretoken_time_to_first_token_seconds_count{S}{RATE}))"
)
"""Tokens per second as they are won: a root for each tree, the drafts that were right, first tokens from prompts."""
SPEEDUP = (
    f"sum(rate(foretoken_spec_plain_seconds_total{S}{RATE}))"
    f" / (sum(rate(foretoken_spec_decode_seconds_total{S}{RATE})) > 0)"
)
_KV_USED = f"1 - sum(foretoken_kv_pages_free{S}) / (sum(foretoken_kv_pages_total{S}) > 0)"
_FAILED = (
    f'(sum(rate(foretoken_requests_total{{finish_reason="error", instance=~"$instance"}}{RATE})))'
    f" / (sum(rate(foretoken_requests_total{S}{RATE})) > 0)"
)
_FULL = {"min": 0, "max": 1, "decimals": 0, **steps((None, "green"), (0.8, "orange"), (0.95, "red"))}
_FROM_0 = {"min": 0}


def _quantile(q: float, name: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (rate({name}_bucket{S}{RATE}))) >= 0"


_HEADLINE = Row(
    "At a glance",
    (
        stat(
            "Workers ready",
            (
                "Servers whose worker is loaded and takes requests. 0: nothing is answered. See 'Worker' below and "
                "the log."
            ),
            f"sum(foretoken_worker_up{S})",
            "none",
            steps((None, "red"), (1, "green")),
        ),
        stat(
            "Requests running",
            "Answers being written now. Compare with 'Running and waiting' below, where the limit is drawn.",
            f"sum(foretoken_requests_running{S})",
            "none",
        ),
        stat(
            "Requests waiting",
            (
                "Requests without a seat. More than a few for minutes: clients wait. Raise max_num_seqs if K/V pages "
                "are free, else add a server."
            ),
            f"sum(foretoken_requests_waiting{S})",
            "none",
            steps((None, "green"), (8, "orange"), (64, "red")),
        ),
        stat(
            "Tokens per second",
            "Tokens of answers, of all requests together, counted as they are won.",
            WON,
            "none",
            {"decimals": 0, **steps((None, "blue"))},
        ),
        stat(
            "First token, p95",
            "19 of 20 answers begin within this time, queueing included.",
            _quantile(0.95, "foretoken_time_to_first_token_seconds"),
            "s",
            steps((None, "green"), (2, "orange"), (5, "red")),
        ),
        stat(
            "Time per token, p50",
            "Mean time of a token after the first, of the middle answer.",
            _quantile(0.5, "foretoken_time_per_output_token_seconds"),
            "s",
        ),
        stat(
            "K/V pages used",
            "Share of the K/V memory held by running requests. Near 100 %: new ones wait and old ones are preempted.",
            _KV_USED,
            "percentunit",
            _FULL,
        ),
        stat(
            "Speed-up by guessing",
            (
                "How many times as fast as without speculation. Below 1 guessing costs: open the board 'Foretoken: "
                "speculation'."
            ),
            SPEEDUP,
            "suffix:x",
            {"decimals": 2, **steps((None, "red"), (0.95, "orange"), (1.05, "green"))},
        ),
    ),
)

_LATENCY = Row(
    "What clients wait for",
    (
        Panel(
            title="First token",
            text=(
                "From arrival to the first token. Rises with the queue (next panel but one), with long prompts, and "
                "when prompts share steps with many answers."
            ),
            queries=quantiles("foretoken_time_to_first_token_seconds"),
            unit="s",
            defaults=_FROM_0,
        ),
        Panel(
            title="Time per token",
            text="Mean time of a token after the first, by answer. What speculation is there to shorten.",
            queries=quantiles("foretoken_time_per_output_token_seconds"),
            unit="s",
            defaults=_FROM_0,
        ),
        Panel(
            title="Between two events of a stream",
            text=(
                "Time from one event of a stream to the next, per token in it. A p99 far above the p50 is stutter: "
                "long prompts or preemptions between the steps."
            ),
            queries=quantiles("foretoken_inter_token_seconds"),
            unit="s",
            defaults=_FROM_0,
        ),
        Panel(
            title="Whole answer",
            text="From arrival to the last token. Depends on how long answers are: read it beside 'Length of answers'.",
            queries=quantiles("foretoken_request_duration_seconds"),
            unit="s",
            defaults=_FROM_0,
        ),
        Panel(
            title="Wait for a seat",
            text=(
                "From arrival until the request began to run. Above a second for long: more is asked than one server "
                "can carry."
            ),
            queries=quantiles("foretoken_request_queue_seconds"),
            unit="s",
            defaults=_FROM_0,
        ),
        heatmap(
            "First token, spread",
            (
                "How many answers began within which time. Two bands are two kinds of requests, such as short and "
                "long prompts."
            ),
            "foretoken_time_to_first_token_seconds",
            "s",
        ),
    ),
)

_TRAFFIC = Row(
    "What is asked",
    (
        Panel(
            title="Tokens",
            text=(
                "Prompt tokens run through the model (those that the prefix cache knew are not) and tokens won for "
                "answers."
            ),
            queries=(Query(f"sum(rate(foretoken_prefill_tokens_total{S}{RATE}))", "prompt"), Query(WON, "answer")),
            unit="none",
            defaults=_FROM_0,
        ),
        Panel(
            title="Answers by how they ended",
            text=(
                "stop and length are whole answers; abort is a client that went away; error is the server's fault: "
                "see the log."
            ),
            queries=(Query(f"sum by (finish_reason) (rate(foretoken_requests_total{S}{RATE}))", "{{finish_reason}}"),),
            unit="reqps",
            defaults=_FROM_0,
            is_stacked=True,
        ),
        Panel(
            title="HTTP answers",
            text=(
                "By status. 4xx are clients' mistakes, 429 is a full queue, 499 a client that left before its "
                "answer, 503 a server that loads or drains."
            ),
            queries=(Query(f"sum by (status) (rate(foretoken_http_requests_total{S}{RATE}))", "{{status}}"),),
            unit="reqps",
            defaults=_FROM_0,
            is_stacked=True,
        ),
        Panel(
            title="Errors",
            text="Share of the answers that the server broke off. Anything but 0 has a line in the log.",
            queries=(Query(_FAILED, "broken off"),),
            unit="percentunit",
            defaults={"min": 0},
        ),
        Panel(
            title="Length of prompts",
            text="Prompt tokens of a request. Longer prompts take K/V pages and delay first tokens.",
            queries=quantiles("foretoken_request_prompt_tokens"),
            unit="none",
            defaults=_FROM_0,
        ),
        Panel(
            title="Length of answers",
            text="Generated tokens of a request.",
            queries=quantiles("foretoken_request_generated_tokens"),
            unit="none",
            defaults=_FROM_0,
        ),
    ),
)

_ROOM = Row(
    "How much room is left",
    (
        Panel(
            title="Running and waiting",
            text=(
                "Requests that run, requests that wait, and how many may run at once (max_num_seqs). Waiting below "
                "the limit: K/V pages are short, not seats."
            ),
            queries=(
                Query(f"sum(foretoken_requests_running{S})", "running"),
                Query(f"sum(foretoken_requests_waiting{S})", "waiting"),
                Query(f"sum(foretoken_max_rows{S})", "limit"),
            ),
            unit="none",
            defaults=_FROM_0,
        ),
        Panel(
            title="K/V pages",
            text="Share held by running requests; pages of the prefix cache that nobody holds count as free.",
            queries=(Query(_KV_USED, "held"),),
            unit="percentunit",
            defaults={"min": 0, "max": 1},
        ),
        Panel(
            title="Preemptions",
            text=(
                "Running requests per second that lost their pages and are computed again. Lasting: give more memory "
                "(kv_cache_gib), or let fewer run (max_num_seqs)."
            ),
            queries=(Query(f"sum(rate(foretoken_preemptions_total{S}{RATE}))", "preempted"),),
            unit="ops",
            defaults=_FROM_0,
        ),
        Panel(
            title="Prefix cache",
            text=(
                "Share of looked-up prompt tokens that were in the cache: they cost nothing. Low is normal when "
                "prompts begin differently, or each has its own API key."
            ),
            queries=(
                Query(
                    f"sum(rate(foretoken_prefix_cache_hit_tokens_total{S}{RATE}))"
                    f" / (sum(rate(foretoken_prefix_cache_query_tokens_total{S}{RATE})) > 0)",
                    "known",
                ),
            ),
            unit="percentunit",
            defaults={"min": 0, "max": 1},
        ),
        Panel(
            title="Where a step's time goes",
            text=(
                "Seconds per second in each phase; 1 together is a worker without a pause. Verify is the model. Large "
                "plan or commit: the host is the limit."
            ),
            queries=(
                Query(
                    "sum by (phase) (rate(foretoken_step_phase_seconds_sum"
                    f'{{phase=~"plan|draft|verify|commit", instance=~"$instance"}}{RATE}))',
                    "{{phase}}",
                ),
            ),
            unit="percentunit",
            defaults=_FROM_0,
            is_stacked=True,
        ),
        Panel(
            title="Steps",
            text="Steps of the worker per second. Few of them while requests run: steps are long, or the worker hangs.",
            queries=(Query(f"sum(rate(foretoken_steps_total{S}{RATE}))", "steps"),),
            unit="ops",
            defaults=_FROM_0,
        ),
    ),
)

_WORKER = Row(
    "Worker",
    (
        Panel(
            title="Ready",
            text="1 while a server's worker is ready. Gaps are restarts: live streams go on with the next worker.",
            queries=(Query(f"foretoken_worker_up{S}", "{{instance}}"),),
            unit="none",
            defaults={"min": 0, "max": 1, "decimals": 0},
        ),
        Panel(
            title="Restarts",
            text=(
                "Workers that died and were replaced in the last 10 minutes. The third death in that time ends the "
                "server with exit code 1; compose starts it again."
            ),
            queries=(Query(f"increase(foretoken_worker_restarts_total{S}[10m])", "{{instance}}"),),
            unit="none",
            defaults=_FROM_0,
        ),
        Panel(
            title="Servers",
            text="What each server runs: version, model, device, type of its numbers, drafter.",
            queries=(Query(f"foretoken_info{S}"),),
            unit="none",
            kind="table",
        ),
    ),
)

SERVING = Board(
    "foretoken-serving",
    "Foretoken: serving",
    "What clients see of a Foretoken server, what they ask of it, and how much room is left.",
    (_HEADLINE, _LATENCY, _TRAFFIC, _ROOM, _WORKER),
)
