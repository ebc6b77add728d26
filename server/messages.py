"""The frozen values that cross the border between the API process and the worker process.

Carried as msgpack (tagged structs), never as pickle. Times are seconds of time.monotonic() of the process
that wrote them, and only differences are sent.
"""

from __future__ import annotations

import msgspec

from verifier.ipc import framed
from verifier.plan import SamplingParams


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One alternative at one token."""

    token: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a chosen token under the raw model distribution, and the best alternatives."""

    logprob: float
    top: tuple[TopLogprob, ...]
    rank: int = 0
    """Of a prompt's token: 1 is the likeliest one at its place."""


# ---- to the worker


class Speculation(msgspec.Struct, frozen=True):
    """How a request wants to be drafted."""

    drafter: str
    """A name from the worker's loaded drafters; "none" is plain decoding."""
    max_nodes: int
    """Most nodes of one tree, root included."""
    wants_record: bool = False
    """Tell the record with every delta: a stop string may end the text before the worker knows."""


class Constraint(msgspec.Struct, frozen=True):
    """Which tokens an answer may hold, beside what its sampling says. It holds with and without speculation alike."""

    grammar: str = ""
    """A grammar of llguidance that the whole answer satisfies, as text; empty is none. See server.grammar."""
    allowed: tuple[int, ...] = ()
    """The only tokens that may be chosen; empty is all."""
    banned: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that may not occur in the answer."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Run this request. `answer` is what was already won before a worker died: the text goes on from there."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    speculation: Speculation
    tenant: str
    answer: tuple[int, ...] = ()
    prediction: tuple[int, ...] = ()
    """What the client expects the whole answer to be: for drafters that can use it, never for the text."""
    constraint: Constraint | None = None
    num_prompt_logprobs: int = -1
    """-1 for none, else how many alternatives to report at every token of the prompt but the first."""
    num_prompt_told: int = 0
    """How many tokens of the prompt were reported already before a worker died, the first one aside."""


class Vocabulary(msgspec.Struct, frozen=True, tag="vocabulary"):
    """What the tokens mean: told before the first request with a grammar."""

    tokenizer_json: str
    eos_ids: tuple[int, ...]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody waits for this request any more."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish nothing more, keep what drafters learned, exit."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Say something between two steps: a worker that does not has hung."""


ToWorker = Submit | Abort | Shutdown | Ping | Vocabulary


# ---- from the worker


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker has loaded and can serve."""

    max_model_len: int
    vocab_size: int
    drafters: tuple[str, ...]
    device: str
    dtype: str
    num_pages: int = 0
    """K/V pages that requests can have."""
    drafter_bytes: dict[str, dict[str, int]] = {}
    """Memory of what the drafters hold, by drafter and part."""
    backend: str = ""
    """What runs the model: see verifier.backend.Backend.name."""
    is_row_invariant: bool = False
    """Whether a row's numbers do not depend on what else is in a step: then no text depends on speculation."""
    is_awake: bool = True
    """Whether drafters draft; else Awake comes later."""


class Awake(msgspec.Struct, frozen=True, tag="awake"):
    """All that a worker compiles beside serving is there: drafters draft from now on."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The worker cannot start: one clear line. If it `is_final`, starting again as things are will not help."""

    reason: str
    is_final: bool = True


class SpeculationRecord(msgspec.Struct, frozen=True):
    """What speculation did for one request so far."""

    num_steps: int
    """Verify steps that carried at least one draft token."""
    num_draft_tokens: int
    num_accepted_tokens: int
    histogram: tuple[int, ...]
    """Entry j: steps that accepted exactly j draft tokens; sums to num_steps."""
    num_prediction_drafted: int = 0
    """Draft tokens that were copied from the request's prediction."""
    num_prediction_accepted: int = 0
    """Those of them that are in the answer."""


class Delta(msgspec.Struct, frozen=True):
    """New tokens of one request. With `finish_reason` it is the request's last event.

    `stop_token` tells that the last of `tokens` is a stop token, which is not part of the text.
    `num_cached_prompt` counts prompt tokens that the prefix cache answered (sent with the first tokens).
    """

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None  # "stop" | "length"
    stop_token: int | None = None
    num_cached_prompt: int | None = None
    record: SpeculationRecord | None = None
    """With the last tokens, and with every delta if `Speculation.wants_record`; counts since the last submission."""
    seated_for_s: float | None = None
    """How long ago the request was first given a row; sent with the first tokens."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the next tokens of the prompt, if asked for; the first token has none. They come before the first tokens of
    the answer, in deltas without tokens."""


class RequestError(msgspec.Struct, frozen=True):
    """One request failed alone; its last event."""

    id: str
    message: str


class StepStats(msgspec.Struct, frozen=True):
    """What one step did, for the metrics. Durations in seconds."""

    num_rows: int
    num_waiting: int
    num_running: int
    num_chunk_tokens: int
    num_nodes: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted: int
    accepted_by_depth: tuple[int, ...]
    """Entry j: draft tokens accepted at depth j + 1."""
    accepted_by_source: tuple[int, ...]
    """Indexed by drafters.base.Source."""
    drafted_by_source: tuple[int, ...]
    pages_free: int
    pages_total: int
    num_preempted: int
    num_prefix_hit_tokens: int
    num_prefix_query_tokens: int
    num_drafter_failures: int
    plan_s: float
    draft_s: float
    verify_s: float
    commit_s: float
    forward_s: float = 0.0
    """The model's part of verify_s; all the rest of a step is host time."""
    num_bypassed: int = 0
    """Rows that could have drafted, and that the speculator let decode plainly."""
    drafted_by_depth: tuple[int, ...] = ()
    """Entry j: draft tokens verified at depth j + 1."""
    drafters_s: dict[str, float] = {}
    """Drafting and reading the news, by drafter."""
    decode_s: float = 0.0
    """All of the step with what passed since the last one, if it had no prompt chunks and costs are known; else 0."""
    plain_s: float = 0.0
    """What the tokens of such a step would have taken in plain steps of as many rows, by the costs measured here."""
    num_won: int = 0
    """Tokens that answers got."""
    drafter_bytes: dict[str, dict[str, int]] | None = None
    """As in Ready, when it has changed since it was last told."""


class Outcome(msgspec.Struct, frozen=True, tag="outcome"):
    """Everything one step has to tell."""

    deltas: tuple[Delta, ...]
    errors: tuple[RequestError, ...]
    stats: StepStats | None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to Ping; also the end of what Busy told."""


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """What comes next may take so long in silence: compiling, recording, measuring, a step with a long prompt."""

    for_s: float


FromWorker = Ready | Refused | Outcome | Pong | Busy | Awake


# ---- on the wire

encode = msgspec.msgpack.Encoder().encode
"""A message, or the Settings (as a map), as msgpack."""


def frame(message: object) -> bytes:
    """One message as it travels: msgpack in a frame."""
    return framed(encode(message))
