"""A server as users start it: it answers before its drafters are compiled, then drafts, and says the same."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tests.api.process import DEMO, serving

WAKE_S = 240.0
PROMPT = "Find me a table for two tonight."


def ask(client: httpx.Client, seed: int) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "ignore_eos": True}
    body |= {"max_tokens": 48, "seed": seed, "temperature": 0.8, "speculative": {"metrics": True}}
    answer = client.post("/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def num_accepted(answer: dict[str, Any]) -> int:
    return int(answer["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"])


def health(client: httpx.Client) -> dict[str, Any]:
    return dict(client.get(str(client.base_url).removesuffix("/v1/") + "/health").json())


def test_a_server_answers_asleep_and_awake_alike() -> None:
    with (
        serving(*DEMO, "m", "--no-wait-for-compile") as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        asleep = [ask(client, seed) for seed in range(3)]
        began = time.monotonic()
        while not health(client)["drafting"]:
            assert time.monotonic() - began < WAKE_S, "the drafters never woke"
            time.sleep(0.2)
        awake = [ask(client, seed) for seed in range(3)]
    assert [one["choices"][0]["message"] for one in awake] == [one["choices"][0]["message"] for one in asleep]
    assert sum(num_accepted(one) for one in awake) > 0
