"""One frozen Settings: the only reader of argv, environment and config file.

The command line, the environment (FORETOKEN_<FIELD>), the YAML file and docs/configuration.md are all made from the
fields below; each carries its help text and bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, help_text: str, **bounds: Any) -> Any:
    """A field of Settings with its sentence; bounds are `ge`, `le`, `choices`."""
    return field(default=default, metadata={"help": help_text, **bounds})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a server can be told. Names are vLLM's where the meaning is the same."""

    model: str = setting("", "Folder or Hub id of a Hugging Face causal language model.")
    revision: str = setting("", "Branch, tag or commit of a Hub model; empty is its default branch.")
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 lets the system choose.", ge=0, le=65535)
    served_model_name: tuple[str, ...] = setting(
        (), "Names under which clients ask for the model; default: the folder's name or Hub id."
    )
    api_key: tuple[str, ...] = setting(
        (), "Accepted API keys; none means no authentication. Each key is a tenant of its own."
    )
    dtype: str = setting(
        "auto",
        "Weights and K/V type; auto takes bfloat16 on a GPU and float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting(
        "auto", "Where the model runs; auto takes a GPU when there is one.", choices=("auto", "cpu", "cuda")
    )
    attention: str = setting("sdpa", "Attention back end; reference is the slow oracle.", choices=("sdpa", "reference"))
    threads: int = setting(
        0, "Compute threads of the worker on a CPU; 0 leaves one core to the API process.", ge=0, le=1024
    )
    max_model_len: int = setting(
        0, "Longest prompt plus answer in tokens; 0 takes the model's own limit.", ge=0, le=16_777_216
    )
    max_num_seqs: int = setting(64, "Most requests that run at once.", ge=1, le=1024)
    max_num_batched_tokens: int = setting(
        2048, "Most packed positions of one step (prompt chunks and tree nodes).", ge=64, le=1_048_576
    )
    page_size: int = setting(16, "Tokens per K/V page.", ge=1, le=256)
    num_pages: int = setting(0, "K/V pages; 0 sizes the pool from memory.", ge=0, le=16_777_216)
    kv_cache_gib: float = setting(
        0.0, "Memory for K/V pages in GiB; 0 chooses: 80 % of what is free on a GPU, at most 4 GiB on a CPU.", ge=0
    )
    enable_prefix_caching: bool = setting(
        True, "Keep finished pages and reuse them for equal prompt prefixes of the same tenant."
    )
    seed: int = setting(
        0, "Server seed: requests without a seed draw theirs from it when it is not 0.", ge=0, le=2**63 - 1
    )
    drafter: str = setting("trigram", "Default drafter of requests that do not name one.")
    trigram_table: str = setting(
        "", "Corpus table made by `foretoken build-trigram`; empty means on-line learning only."
    )
    trigram_state: str = setting(
        "", "File in which the tri-gram drafter keeps what it learned on line across restarts; empty keeps nothing."
    )
    trigram_search: str = setting(
        "best-first",
        "Draft maker: exact best-first, or the paper's search with its exploration bonus.",
        choices=("best-first", "explore"),
    )
    max_nodes: int = setting(16, "Most nodes of one draft tree, root included; 1 is plain decoding.", ge=1, le=64)
    max_queued: int = setting(256, "Most requests that wait; more are answered 429 with Retry-After.", ge=0, le=100_000)
    max_body_bytes: int = setting(8 * 2**20, "Largest request body.", ge=1024, le=2**30)
    max_stop_strings: int = setting(4, "Most stop strings of one request.", ge=1, le=16)
    max_logprobs: int = setting(20, "Most alternatives per token a request may ask for.", ge=0, le=20)
    keep_alive_s: float = setting(15.0, "Seconds between comment pings on a silent stream.", ge=0.1, le=3600)
    drain_timeout_s: float = setting(30.0, "How long a SIGTERM waits for running answers.", ge=0, le=3600)
    log_level: str = setting("info", "Log level.", choices=("debug", "info", "warning", "error"))
