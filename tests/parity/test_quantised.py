"""Promise 1 on quantised weights: with trees, the text of transformers' own generate on the same checkpoint.

Each format is tested where its packages are, and refused in one line where they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import quantised
from tests.families import VOCAB
from tests.parity.harness import AnswerFuzz, assert_same, generate, greedy, make_loop, run_all, submit
from verifier.fingerprint import model_fingerprint
from verifier.load import load_backend
from verifier.options import VerifierOptions

NUM_TOKENS = 32
FORMATS: dict[str, Callable[[Path], str]] = {
    "torchao_int8": quantised.torchao("Int8WeightOnlyConfig"),
    "torchao_int8_by_token": quantised.torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao_int4": quantised.torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=("PerGroup", quantised.GROUP)
    ),
    "bitsandbytes_nf4": quantised.bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes_int8": quantised.bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
    "compressed_tensors_int8": quantised.compressed_tensors("token"),
    "fp8": quantised.fp8,
    "gptq": quantised.gptq,
    "awq": quantised.awq,
}

ROUNDED = ("torchao_int8_by_token", "compressed_tensors_int8")
"""Activations are rounded to 8 bits as well: the last bit of a float may move one of them by a whole step."""
TIE = 0.05


@pytest.mark.filterwarnings("ignore")  # of the packages, which are not ours to mend
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_equals_generate(name: str, tmp_path: Path) -> None:
    folder = FORMATS[name](tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in (3, 41, 20)]
    answers, gaps = generate(folder, prompts, NUM_TOKENS)
    assert len({token for answer in answers for token in answer}) > 8, "a target that repeats itself proves nothing"
    verifier = load_backend(
        VerifierOptions(model=folder, device="cpu", threads=1, max_rows=4, max_positions=48, num_pages=33, page_size=8)
    )
    fuzz = AnswerFuzz(7, VOCAB, {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)})
    loop = make_loop(verifier, {"fuzz": fuzz}, max_batched_tokens=48)
    requests = [submit(f"r{i}", prompt, greedy(NUM_TOKENS)) for i, prompt in enumerate(prompts)]
    run = run_all(loop, requests, arrivals=[0, 0, 3])
    for index, answer in enumerate(answers):
        assert_same(run.answers[f"r{index}"], answer, gaps[index], f"{name} r{index}", TIE if name in ROUNDED else 1e-4)
    assert fuzz.num_accepted > 20
    assert len(model_fingerprint(folder)) == 64
    shared = verifier.shared_weights
    assert shared.input_embedding.shape == shared.output_embedding.shape == (VOCAB, 128)
    assert shared.output_embedding.is_floating_point()
