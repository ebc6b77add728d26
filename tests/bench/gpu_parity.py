"""A section of the GPU check: what the verifier says on the device is what transformers says there, ties told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.bench.gpu_room import Room, first_line
from tests.bench.gpu_steps import MODES, free
from tests.families import VOCAB, save_model
from tests.random_trees import pick
from tests.truth import greedy_answer
from verifier.backend import Backend
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("llama", "gpt_oss", "gemma2", "deepseek_v3")
_EXPERTS = ("gpt_oss", "deepseek_v3")
"""In float32 alone: where a router is undecided, rounding changes which experts speak, and then everything."""
TESTS = ("tests/parity/test_kernels.py",)
"""Run as they are where their packages are installed; the server's are not on every GPU machine."""
_PROMPTS = ([5, 6, 7, 8, 9], list(range(3, 43)))
_SAMPLING: tuple[dict[str, Any], ...] = ({"top_p": 0.9, "top_k": 40}, {"min_p": 0.05}, {"presence_penalty": 0.5})
_TIE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""How far apart the two best logits may lie, beside the largest, where the answers part and it is still a tie: what
rounding in the type comes to through a few layers."""


@dataclass(frozen=True)
class Truth:
    """transformers' own greedy answer to a prompt."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]
    """Between the two best logits at each token, as a share of the largest."""


def check_parity(room: Room) -> None:
    """Random models of several families: greedy against `generate`, sampled against the oracle's back end."""
    room.found["failures"] = []
    families = FAMILIES[:1] if room.is_tiny else FAMILIES
    for family in families:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and family in _EXPERTS:
                continue
            if room.is_over:
                room.add("left_out", f"{family} {dtype}")
                continue
            try:
                with tempfile.TemporaryDirectory() as folder:
                    _check_family(room, family, save_model(family, folder, num_hidden_layers=2), dtype)
            except Exception as error:
                room.add("failures", f"{family} {dtype}: {first_line(error)}")
            free(room)
    if not sum(run["accepted"] for run in room.list("runs")):
        room.add("failures", "no draft was accepted")
    room.found["passed"] = not room.found["failures"]
    room.save()
    room.found["pytest"] = "not run in --tiny" if room.is_tiny else run_tests(room)
    room.found["passed"] &= "failed" not in room.found["pytest"]
    room.save()


def _check_family(room: Room, family: str, folder: str, dtype: torch.dtype) -> None:
    num_tokens = 4 if room.is_tiny else 48
    truths = generate(folder, dtype, room.device, num_tokens)
    greedy = SamplingParams(max_tokens=num_tokens, seed=0, temperature=0.0)
    modes = ("eager",) if room.is_tiny else ("graphs", "compiled", "eager")
    for mode in modes:
        if mode == "compiled" and (family, dtype) != ("llama", torch.bfloat16):
            continue
        if room.is_over:
            room.add("left_out", f"{family} {dtype} {mode}")
            continue
        verifier = load(folder, dtype, room.device, "triton", mode)
        if mode == "compiled" and not verifier.is_compiled:
            continue
        for is_drafting in (False, True):
            for truth in truths:
                tokens, num_accepted = answer(verifier, truth, is_drafting, greedy)
                told = compare(tokens, truth, _TIE[dtype])
                run = {"family": family, "dtype": str(dtype), "mode": mode, "drafts": is_drafting, **told}
                run["accepted"] = num_accepted
                room.add("runs", run)
                if not told["ok"]:
                    room.add("failures", f"{family} {dtype} {mode} drafts {is_drafting}: {told}")
        if mode == "eager" and dtype == torch.float32:
            _check_sampled(room, family, (folder, verifier), truths[0])


def _check_sampled(room: Room, family: str, model: tuple[str, Backend], truth: Truth) -> None:
    """Drawn with noise, down trees: our kernels and the oracle's attention with torch's sampler say the same."""
    folder, verifier = model
    oracle = load(folder, torch.float32, room.device, "sdpa", "eager")
    for seed, given in enumerate(_SAMPLING[:1] if room.is_tiny else _SAMPLING):
        sampling = SamplingParams(max_tokens=len(truth.tokens), seed=seed, temperature=0.9, **given)
        expected, _ = answer(oracle, truth, False, sampling)
        found, _ = answer(verifier, Truth(truth.prompt, expected, truth.gaps), True, sampling)
        room.add("sampled", {"family": family, "sampling": given, "ok": found == expected})
        if found != expected:
            room.add("failures", f"{family} sampled {given}: {found}, not {expected}")


def load(folder: str, dtype: torch.dtype, device: str, attention: str, mode: str) -> Backend:
    verifier = load_backend(
        VerifierOptions(
            model=folder,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            attention=attention,
            threads=1,
            max_rows=2,
            max_positions=128,
            max_model_len=192,
            num_pages=40,
            **MODES[mode],
        )
    )
    verifier.prepare_first()
    return verifier


def answer(verifier: Backend, truth: Truth, is_drafting: bool, sampling: SamplingParams) -> tuple[list[int], int]:
    """The verifier's own answer, and how many drafts it took: random trees into which true tokens are mixed."""
    rng, trees = np.random.default_rng(len(truth.prompt)), DraftTrees.allocate(1)
    pages = tuple((0, index, index + 1) for index in range(12))
    start = RowStart(0, tuple(truth.prompt), len(truth.prompt), sampling)
    chunk = Chunk(0, 0, tuple(truth.prompt), True)
    verdict = verifier.run(StepPlan(starts=(start,), pages=pages, chunks=(chunk,)), trees)
    won, num_accepted = [int(verdict.tokens[0, 0])], 0
    while len(won) < len(truth.tokens):
        future = truth.tokens[len(won) :] if is_drafting else []
        tokens, parents = draft(rng, won[-1], future, pick(rng, 6, 24) if is_drafting else 1)
        trees.clear()
        trees.append(tokens, parents, [1.0] * len(tokens), [0] * len(tokens))
        slot = TreeSlot(0, len(truth.prompt) + len(won) - 1, len(tokens))
        verdict = verifier.run(StepPlan(trees=(slot,)), trees)
        if verdict.failed:
            raise ArithmeticError("logits are not finite")
        won += verdict.tokens[0, : verdict.num_accepted[0] + 1].tolist()
        num_accepted += int(verdict.num_accepted[0])
    return won[: len(truth.tokens)], num_accepted


def draft(rng: np.random.Generator, root: int, future: list[int], size: int) -> tuple[list[int], list[int]]:
    """A tree of about `size` nodes: some of the true tokens on one path, random ones everywhere."""
    tokens, parents, right = [root], [-1], [0]
    for _ in range(size - 1):
        is_right = len(right) <= len(future) and rng.random() < 0.5
        parent = right[-1] if is_right else int(rng.integers(0, len(tokens)))
        token = future[len(right) - 1] if is_right else int(rng.integers(0, VOCAB))
        if (parent, token) in set(zip(parents, tokens, strict=True)):
            continue
        tokens.append(token)
        parents.append(parent)
        if parent == right[-1] and len(right) <= len(future) and token == future[len(right) - 1]:
            right.append(len(tokens) - 1)
    return tokens, parents


def compare(tokens: list[int], truth: Truth, tie: float) -> dict[str, Any]:
    """How many tokens are equal, and the gap where the answers part: a tie, or an error."""
    pairs = zip(tokens, truth.tokens, strict=True)
    parted = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    if parted is None:
        return {"ok": True, "equal": len(tokens)}
    gap = truth.gaps[parted]
    return {"ok": gap <= tie, "equal": parted, "of": len(tokens), "gap": round(gap, 6)}


@torch.inference_mode()
def generate(folder: str, dtype: torch.dtype, device: str, num_tokens: int) -> list[Truth]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval().to(device)
    truths = []
    for prompt in _PROMPTS:
        tokens, logits = greedy_answer(model, prompt, num_tokens)
        logits = logits.double()
        best = logits.topk(2, dim=-1).values
        gaps = ((best[:, 0] - best[:, 1]) / logits.abs().amax(-1)).tolist()
        truths.append(Truth(prompt, tokens, gaps))
    return truths


def run_tests(room: Room) -> str:
    """The project's own parity tests on the device, where what they import is installed."""
    missing = [name for name in ("pytest", "msgspec") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run: {', '.join(missing)} not installed"
    command = [sys.executable, "-m", "pytest", "-x", "-q", *TESTS]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, room.left_s))
    except subprocess.TimeoutExpired:
        return "not finished in time"
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [""]
    return f"{'passed' if done.returncode == 0 else 'failed'}: {lines[-1]}"
