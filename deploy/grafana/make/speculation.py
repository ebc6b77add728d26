"""The dashboard of speculation: whether guessing pays, and why not when it does not."""

from __future__ import annotations

from deploy.grafana.make.panels import Board, Panel, Query, Row, heatmap, stat, steps
from deploy.grafana.make.serving import RATE, SPEEDUP, S


def _rate(name: str, labels: str = S, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate(foretoken_{name}{labels}{RATE}))"


_PHASES = '{phase=~"plan|draft|verify|commit", instance=~"$instance"}'
_STEP_S = _rate("step_phase_seconds_sum", _PHASES)
_TREES = f"({_rate('tree_nodes_total')} - {_rate('spec_draft_tokens_total')} > 0)"
_PER_STEP = f"1 + {_rate('spec_accepted_tokens_total')} / {_TREES}"
_LENGTH = f"1 + {_rate('spec_accepted_tokens_total')} / ({_rate('spec_drafts_total')} > 0)"
_RIGHT = f"{_rate('spec_accepted_tokens_total')} / ({_rate('spec_draft_tokens_total')} > 0)"
_DRAFT_SHARE = f"{_rate('drafter_seconds_total')} / ({_STEP_S} > 0)"
_BYPASSED = f"{_rate('spec_bypassed_steps_total')} / ({_rate('steps_total')} > 0)"
_BY_SOURCE = (
    f"{_rate('spec_accepted_tokens_per_source_total', by='source')}"
    f" / ({_rate('spec_draft_tokens_per_source_total', by='source')} > 0)"
)
_BY_DEPTH = (
    f"{_rate('spec_accepted_tokens_per_depth_total', by='depth')}"
    f" / ({_rate('spec_draft_tokens_per_depth_total', by='depth')} > 0)"
)
_PLAIN = {"decimals": 2, **steps((None, "blue"))}
_SHARE = {"min": 0, "decimals": 0, **steps((None, "blue"))}

_HEADLINE = Row(
    "Does guessing pay?",
    (
        stat(
            "Speed-up",
            (
                "How many times as fast answers come as without speculation, by the server's own measured cost of "
                "plain steps. Below 1: see the causes below."
            ),
            SPEEDUP,
            "suffix:x",
            {"decimals": 2, **steps((None, "red"), (0.95, "orange"), (1.05, "green"))},
        ),
        stat(
            "Tokens per step",
            "Tokens that an answer gains in a step, plain steps included. 1 is decoding without speculation.",
            _PER_STEP,
            "none",
            _PLAIN,
        ),
        stat(
            "Acceptance length",
            (
                "Tokens that a verified draft tree wins, the sure one included. Higher than tokens per step where "
                "steps are bypassed."
            ),
            _LENGTH,
            "none",
            _PLAIN,
        ),
        stat(
            "Guesses right",
            (
                "Share of the verified draft tokens that were accepted. Trees guess several ways at once, so 20 % can "
                "pay well."
            ),
            _RIGHT,
            "percentunit",
            _SHARE,
        ),
        stat(
            "Time for drafting",
            (
                "Share of the step time that drafters take, reading what came of their guesses included. Speed-up has "
                "paid for it."
            ),
            _DRAFT_SHARE,
            "percentunit",
            _SHARE,
        ),
        stat(
            "Steps without guesses",
            (
                "Share of the steps in which requests could have drafted and none did, because it would not pay: the "
                "speculator at work."
            ),
            _BYPASSED,
            "percentunit",
            _SHARE,
        ),
        stat(
            "Drafter failures",
            (
                "Requests whose drafter failed in the last hour and that go on without. Anything but 0 has a line in "
                "the log."
            ),
            f"sum(increase(foretoken_drafter_failures_total{S}[1h]))",
            "none",
            {"decimals": 0, **steps((None, "green"), (0.5, "red"))},
        ),
        stat(
            "Drafters' memory",
            "Tables, heads and what was learned on line, together.",
            f"sum(foretoken_drafter_bytes{S})",
            "bytes",
        ),
    ),
)

_CAUSES = Row(
    (
        "When it does not pay: the causes, side by side. Is what is won less than what is paid? Are guesses wrong, "
        "drafting slow, trees dear, steps bypassed?"
    ),
    (
        Panel(
            title="Won against paid",
            text=(
                "Tokens that an answer gains in a step, and what the step costs in plain steps. Guessing pays while "
                "the first line is above the second; if they meet, the panels on the right say which of the two "
                "moved."
            ),
            queries=(Query(_PER_STEP, "tokens won"), Query(f"({_PER_STEP}) / ({SPEEDUP})", "plain steps paid")),
            unit="none",
            width=8,
            defaults={"min": 0, "decimals": 2},
        ),
        Panel(
            title="1. Are guesses wrong?",
            text=(
                "Share of each drafter's guesses that were right. All low: the texts are unlike what the drafters "
                "know; build a table or train a head from what your users ask (docs/drafters.md). One low: the "
                "speculator already trusts it less."
            ),
            queries=(Query(_BY_SOURCE, "{{source}}"),),
            unit="percentunit",
            width=4,
            defaults={"min": 0},
        ),
        Panel(
            title="2. Is drafting slow?",
            text=(
                "Share of the step time that each drafter takes. Above a quarter while the speed-up is small: "
                "take a cheaper drafter (--drafter trigram), or lower --max-nodes."
            ),
            queries=(Query(f"{_rate('drafter_seconds_total', by='drafter')} / scalar({_STEP_S} > 0)", "{{drafter}}"),),
            unit="percentunit",
            width=4,
            defaults={"min": 0},
        ),
        Panel(
            title="3. Are trees dear?",
            text=(
                "Nodes verified in a step, and the milliseconds of verifying it. Time that rises with the nodes: the "
                "model is at the limit of its arithmetic (many requests, small GPU); lower --max-nodes."
            ),
            queries=(
                Query(f"{_rate('step_tree_nodes_sum')} / ({_rate('step_tree_nodes_count')} > 0)", "nodes"),
                Query(
                    "1000 * "
                    + _rate("step_phase_seconds_sum", '{phase="verify", instance=~"$instance"}')
                    + f" / ({_rate('steps_total')} > 0)",
                    "ms",
                ),
            ),
            unit="none",
            width=4,
            defaults={"min": 0, "decimals": 1},
        ),
        Panel(
            title="4. Are steps bypassed?",
            text=(
                "Share of the steps without any guess, and of the answers in a step that go without. Near 100 %: the "
                "speculator found that guessing does not pay; the first three panels show why."
            ),
            queries=(
                Query(_BYPASSED, "steps"),
                Query(f"{_rate('spec_bypassed_rows_total')} / {_TREES}", "answers"),
            ),
            unit="percentunit",
            width=4,
            defaults={"min": 0},
        ),
    ),
)

_ACCEPTANCE = Row(
    "How much is accepted",
    (
        Panel(
            title="Speed-up over time",
            text=(
                "Plain cost of the tokens won, over what they did cost. The line at 1 is a server without speculation."
            ),
            queries=(Query(SPEEDUP, "speed-up"), Query("vector(1)", "without speculation")),
            unit="suffix:x",
            defaults={"min": 0, "decimals": 2},
        ),
        Panel(
            title="Acceptance length and tokens per step",
            text=(
                "Tokens that a draft tree wins, and tokens that an answer gains in any step. They part where steps "
                "are bypassed."
            ),
            queries=(Query(_LENGTH, "acceptance length"), Query(_PER_STEP, "tokens per step")),
            unit="none",
            defaults={"min": 1, "decimals": 2},
        ),
        Panel(
            title="Who wins the tokens",
            text=(
                "Accepted tokens of a draft tree by who guessed them; with the sure token they add up to the "
                "acceptance length."
            ),
            queries=(
                Query(
                    f"{_rate('spec_accepted_tokens_per_source_total', by='source')}"
                    f" / scalar({_rate('spec_drafts_total')} > 0)",
                    "{{source}}",
                ),
            ),
            unit="none",
            defaults={"min": 0, "decimals": 2},
            is_stacked=True,
        ),
        Panel(
            title="Guesses right, by depth",
            text=(
                "Share of the verified draft tokens at each depth that were accepted. Falls with depth; steep means "
                "that long guesses are wasted."
            ),
            queries=(Query(_BY_DEPTH, "depth {{depth}}"),),
            unit="percentunit",
            defaults={"min": 0},
        ),
        Panel(
            title="Accepted by depth, in the last five minutes",
            text=(
                "Draft trees whose guess at this depth was right, of all draft trees. The bars add up to the "
                "acceptance length less one."
            ),
            queries=(
                Query(
                    f"sort_desc(sum by (depth) (rate(foretoken_spec_accepted_tokens_per_depth_total{S}[5m]))"
                    f" / scalar(sum(rate(foretoken_spec_drafts_total{S}[5m])) > 0) > 0)",
                    "{{depth}}",
                ),
            ),
            unit="percentunit",
            kind="bargauge",
            defaults={"min": 0, "max": 1, **steps((None, "blue"))},
        ),
        heatmap(
            "Acceptance length of answers",
            (
                "Each answer's tokens per verified step. A band at the bottom: many answers gain nothing; two bands: "
                "two kinds of texts, of which one is foreign to the drafters."
            ),
            "foretoken_spec_acceptance_length",
            "none",
        ),
    ),
)

_COST = Row(
    "What it costs",
    (
        Panel(
            title="Draft cost against verify cost",
            text=(
                "Milliseconds of a step: drafters (guessing and reading what came of it) and verify (the model's pass "
                "over all trees)."
            ),
            queries=(
                Query(f"1000 * {_rate('drafter_seconds_total')} / ({_rate('steps_total')} > 0)", "drafters"),
                Query(
                    "1000 * "
                    + _rate("step_phase_seconds_sum", '{phase="verify", instance=~"$instance"}')
                    + f" / ({_rate('steps_total')} > 0)",
                    "verify",
                ),
            ),
            unit="ms",
            defaults={"min": 0},
        ),
        heatmap(
            "Nodes of a step",
            (
                "Tree nodes verified together, roots included. Follows the number of requests; falls when the "
                "speculator cuts trees."
            ),
            "foretoken_step_tree_nodes",
            "none",
        ),
        Panel(
            title="Draft tokens, and those accepted",
            text=(
                "Draft tokens verified and accepted per second. The gap is work in vain, which is cheap as long as "
                "the model has arithmetic to spare."
            ),
            queries=(
                Query(_rate("spec_draft_tokens_total"), "verified"),
                Query(_rate("spec_accepted_tokens_total"), "accepted"),
            ),
            unit="none",
            defaults={"min": 0},
        ),
    ),
)

_DRAFTERS = Row(
    "Drafters",
    (
        Panel(
            title="Who guesses",
            text="Draft tokens verified per second by who guessed them.",
            queries=(Query(_rate("spec_draft_tokens_per_source_total", by="source"), "{{source}}"),),
            unit="none",
            width=6,
            defaults={"min": 0},
            is_stacked=True,
        ),
        Panel(
            title="Requests bypassed",
            text=(
                "Requests per second and step that could have drafted and decoded plainly, because their drafts would "
                "not pay."
            ),
            queries=(Query(_rate("spec_bypassed_rows_total"), "bypassed"),),
            unit="ops",
            width=6,
            defaults={"min": 0},
        ),
        Panel(
            title="Failures",
            text="Requests per second whose drafter failed; they go on without guesses. The log has each reason.",
            queries=(Query(_rate("drafter_failures_total"), "failed"),),
            unit="ops",
            width=6,
            defaults={"min": 0},
        ),
        Panel(
            title="Memory of tables and heads",
            text="Bytes by drafter and part. What is learned on line grows up to its bound.",
            queries=(Query(f"sum by (drafter, part) (foretoken_drafter_bytes{S})", "{{drafter}} {{part}}"),),
            unit="bytes",
            width=6,
            defaults={"min": 0},
            is_stacked=True,
        ),
    ),
)

SPECULATION = Board(
    "foretoken-speculation",
    "Foretoken: speculation",
    "Whether guessing pays, and why not when it does not.",
    (_HEADLINE, _CAUSES, _ACCEPTANCE, _COST, _DRAFTERS),
)
