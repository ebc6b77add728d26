"""`foretoken serve` without a model, where the weights of the default one are installed: README's first request, and
greedy answers of a GGUF file that are those of `generate`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import default_model
from server.gguf import resolve
from tests.api.process import ROOT, serving

FILE = default_model.weights()
NUM_TOKENS = 16
ASKED = (
    "What is the capital of Japan?", "Write a haiku about rain.", "Translate to French: good morning", "2 + 2 =",
    "List three fruits.", "Why is the sky blue?", "Write a function that adds two numbers in Python.", "Hello",
    "Summarise: The cat sat on the mat because it was warm.", "Name a colour.", "Tell me a joke.", "What is water?",
    "Repeat: one two three one two three one two three", "Who are you?", "How do I boil an egg?", "Give me a rhyme.",
    "What is the plural of mouse?", "Explain gravity to a child.", "Is 7 a prime number?", "Write a short email.",
)  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason=f"{default_model.REQUIREMENT} is not installed"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Base URL of a server without a model; the file is converted before, however long that takes."""
    resolve(str(FILE))
    with serving("--max-num-seqs", "4") as url:
        yield url


def test_the_readme_s_first_request_is_answered_rightly(url: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^curl -N (\S+) .*? -d '(\{.*?\})'$", readme, flags=re.MULTILINE | re.DOTALL)
    assert command is not None
    body = {**json.loads(command[2]), "stream": False}
    answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert answer.json()["model"] == default_model.NAME


def generated() -> list[str]:
    """What `generate` says, on the model that transformers itself loads from the file."""
    assert FILE is not None
    from transformers import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    model = AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    answers = []
    for text in ASKED:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def test_twenty_greedy_answers_are_those_of_generate_on_the_file(url: str) -> None:
    def ask(text: str) -> str:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "temperature": 0}
        body |= {"model": default_model.NAME, "max_tokens": NUM_TOKENS}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, ASKED))
    assert answers == generated()
