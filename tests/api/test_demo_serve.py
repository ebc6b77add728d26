"""`foretoken serve` with the demo model, as a process: no network, chats answered, greedy text that of transformers."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import default_model, demo
from tests.api.process import DEMO, ROOT, serving

ASKED = (
    "Find me a table for two tonight.",
    "I need a flight from Paris to London next Friday.",
    "Hi, could you help me search for some Rock-and-roll songs please?",
)


class Hub:
    """A stand-in for the Hub that only counts who calls. Owns its server thread and the list of paths asked for."""

    def __init__(self) -> None:
        asked: list[str] = []

        class Refuse(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            do_HEAD = do_POST = do_GET  # noqa: N815

        self.asked = asked
        self._server = HTTPServer(("127.0.0.1", 0), Refuse)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Hub]]:
    """Base URL of a server with the demo model, also under the default one's name, and the Hub that it must not ask."""
    hub = Hub()
    with pytest.MonkeyPatch.context() as patch, closing(hub):
        patch.setenv("HF_ENDPOINT", hub.url)
        with serving(*DEMO, default_model.NAME) as url:
            yield url, hub


def ask(url: str, text: str, **fields: object) -> dict[str, Any]:
    body = {"model": demo.NAME, "messages": [{"role": "user", "content": text}], **fields}
    response = httpx.post(f"{url}/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def generated(texts: tuple[str, ...], num_tokens: int) -> list[str]:
    """What transformers' own generate says, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    answers = []
    for text in texts:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=False)
        answers.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_greedy_text_is_that_of_generate_and_speculation_won_tokens(served: tuple[str, Hub]) -> None:
    shown = {"metrics": True}
    found = [ask(served[0], text, temperature=0, max_tokens=48, speculative=shown) for text in ASKED]
    texts = [answer["choices"][0]["message"]["content"] for answer in found]
    assert texts == generated(ASKED, 48)
    assert all(len(text) > 10 for text in texts)
    counts = [answer["metrics"]["speculative_decoding"] for answer in found]
    won = sum(count["num_accepted_draft_tokens"] for count in counts)
    assert won > sum(count["num_spec_steps"] for count in counts), "a fresh server drafts from the table"


def test_the_readme_s_first_request_is_answered_as_it_stands(served: tuple[str, Hub]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^curl -N (\S+) .*? -d '(\{.*?\})'$", readme, flags=re.MULTILINE | re.DOTALL)
    assert command is not None
    url = command[1].replace("http://127.0.0.1:8000/v1", served[0])
    response = httpx.post(url, content=command[2], headers={"Content-Type": "application/json"}, timeout=60)
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert any('"content":' in line for line in lines)


def test_the_model_list_names_the_demo(served: tuple[str, Hub]) -> None:
    card, another = httpx.get(f"{served[0]}/models").json()["data"]
    assert (card["id"], another["id"]) == (demo.NAME, default_model.NAME)
    assert card["max_model_len"] == 1024


def test_bench_runs_against_it(served: tuple[str, Hub], tmp_path_factory: pytest.TempPathFactory) -> None:
    prompts = tmp_path_factory.mktemp("bench") / "prompts.txt"
    prompts.write_text("\n".join(f"I want a table for {number} people." for number in range(2, 10)))
    words = ["bench", "--url", served[0], "--prompts", str(prompts), "--rounds", "1", "--max-tokens", "16"]
    words += ["--concurrency", "1", "--warmup", "1"]
    done = subprocess.run([sys.executable, "-m", "server.cli", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.inference_mode()
def test_log_likelihoods_as_evaluation_tools_ask_for_them(served: tuple[str, Hub]) -> None:
    """Token ids, an echo and one token, or none: the context's scores are cut off, those of the rest summed up."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in ASKED]
    for max_tokens in (1, 0):
        body = {"model": demo.NAME, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        response = httpx.post(f"{served[0]}/completions", json={**body, "temperature": 0, "seed": 1}, timeout=60)
        assert response.status_code == 200, response.text
        for prompt, choice in zip(prompts, response.json()["choices"], strict=True):
            expected = model(torch.tensor([prompt])).logits[0].double().log_softmax(dim=-1)
            logprobs = choice["logprobs"]
            assert len(logprobs["tokens"]) == len(prompt) + max_tokens
            assert logprobs["token_logprobs"][0] is None
            found = logprobs["token_logprobs"][1 : len(prompt)]
            own = [expected[place, token].item() for place, token in enumerate(prompt[1:])]
            assert found == pytest.approx(own, abs=1e-4)
            is_best = [one == max(top.values()) for one, top in zip(found, logprobs["top_logprobs"][1:], strict=False)]
            assert is_best == [token == expected[place].argmax() for place, token in enumerate(prompt[1:])]


def test_tokens_are_those_of_transformers(served: tuple[str, Hub]) -> None:
    tokenizer, root = AutoTokenizer.from_pretrained(demo.MODEL), served[0].removesuffix("/v1")
    ids = httpx.post(f"{root}/tokenize", json={"prompt": ASKED[0]}).json()["tokens"]
    assert ids == tokenizer(ASKED[0])["input_ids"]
    assert httpx.post(f"{root}/detokenize", json={"tokens": ids}).json()["prompt"] == tokenizer.decode(ids)
    turns = [{"role": "user", "content": ASKED[0]}, {"role": "assistant", "content": "There is"}]
    body = {"model": demo.NAME, "messages": turns, "continue_final_message": True}
    found = httpx.post(f"{served[0]}/chat/completions/render", json=body).json()
    expected = tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=True)["input_ids"]
    assert found["token_ids"] == expected
    assert found["prompt"] == tokenizer.decode(expected)


def test_nobody_asked_the_hub(served: tuple[str, Hub]) -> None:
    assert served[1].asked == []
