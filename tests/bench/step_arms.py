"""One step of one sequence, by whoever can make it: the verifier in its modes, transformers' own model beside it.

An arm holds `context` tokens and verifies drafts behind them, always in the same place: nothing that a step writes is
kept. Ours is all of `Backend.run` (pack, forward pass, choice, walk, move); theirs is the forward pass and the argmax.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from verifier.cpu.threads import team_size
from verifier.load import load_backend
from verifier.options import VerifierOptions
from verifier.plan import MAX_TREE_NODES, Chunk, RowStart, SamplingParams, StepPlan, TreeSlot
from verifier.tree import DraftTrees, derive, walk

_HITS = 4
"""Nodes of a draft that are true, if it has so many: what a step wins does not depend on its size."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A tree to verify, root first."""

    kind: str
    tokens: list[int]
    parents: list[int]

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def label(self) -> str:
        return str(self.size) if self.kind == "chain" else f"{self.size}t"

    def fill(self, trees: DraftTrees) -> DraftTrees:
        trees.clear()
        trees.append(self.tokens, self.parents, [1.0] * self.size, [0] * self.size)
        return trees


def make_draft(kind: str, size: int, truth: Sequence[int], rng: np.random.Generator, vocab_size: int) -> Draft:
    """`size` nodes behind the root truth[0], the next ones true, the others wrong.

    In a tree every true node comes behind a wrong sibling, so that its K/V have to move.
    """
    tokens, parents, node, level = [truth[0]], [-1], 0, 1
    true_levels = min(_HITS, size - 1, len(truth) - 1)

    def wrong(parent: int) -> int:
        taken = {tokens[place] for place in range(len(tokens)) if parents[place] == parent} | set(truth)
        while True:
            token = int(rng.integers(3, vocab_size))
            if token not in taken:
                return token

    while len(tokens) < size:
        if level <= true_levels:
            if kind == "tree" and len(tokens) + 1 < size:
                tokens.append(wrong(node))
                parents.append(node)
            tokens.append(truth[level])
            parents.append(node)
            node, level = len(tokens) - 1, level + 1
            continue
        parent = len(tokens) - 1 if kind == "chain" else int(rng.integers(max(0, len(tokens) - 8), len(tokens)))
        tokens.append(wrong(parent))
        parents.append(parent)
    return Draft(kind, tokens, parents)


class Arm(Protocol):
    """Makes steps. `prepare` is not timed; what `step` returns, `won` turns into the tokens won."""

    name: str
    torch_threads: int
    """What torch has while this arm runs: one where all is computed by our own code, and its threads."""

    def prepare(self, draft: Draft) -> None: ...

    def step(self) -> Any: ...

    def won(self, draft: Draft, result: Any) -> list[int]: ...

    def restore(self, draft: Draft) -> None: ...


class Ours:
    """The verifier behind one row. Owns it."""

    def __init__(self, name: str, options: VerifierOptions, prompt: Sequence[int]) -> None:
        self.name = name
        self.verifier = load_backend(options)
        self.torch_threads = torch.get_num_threads()
        self._context = len(prompt)
        self._trees = DraftTrees.allocate(1)
        size = options.page_size
        pages = tuple((0, index, index + 1) for index in range(-(-(self._context + MAX_TREE_NODES) // size)))
        sampling = SamplingParams(max_tokens=MAX_TREE_NODES, seed=0, temperature=0.0)
        start = RowStart(0, tuple(prompt), self._context, sampling)
        chunk = Chunk(0, 0, tuple(prompt), True)
        verdict = self.verifier.run(StepPlan(starts=(start,), pages=pages, chunks=(chunk,)), self._trees)
        self.first = int(verdict.tokens[0, 0])
        """The token behind the prompt."""

    def decode(self, count: int) -> list[int]:
        """`count` tokens behind the prompt, greedily; the row stays where it was."""
        found = [self.first]
        while len(found) < count:
            self.prepare(Draft("chain", [found[-1]], [-1]))
            plan = StepPlan(trees=(TreeSlot(0, self._context + len(found) - 1, 1),))
            found.append(int(self.verifier.run(plan, self._trees).tokens[0, 0]))
        return found

    def prepare(self, draft: Draft) -> None:
        draft.fill(self._trees)
        self._plan = StepPlan(trees=(TreeSlot(0, self._context, draft.size),))

    def step(self) -> Any:
        return self.verifier.run(self._plan, self._trees)

    def won(self, draft: Draft, result: Any) -> list[int]:
        found: list[int] = result.tokens[0, : result.num_accepted[0] + 1].tolist()
        return found

    def restore(self, draft: Draft) -> None: ...


class Theirs:
    """transformers' own model and cache. Owns both."""

    def __init__(self, name: str, model: torch.nn.Module, cache: Any, prompt: Sequence[int]) -> None:
        self.name, self._model, self._cache, self._context = name, model, cache, len(prompt)
        self.torch_threads = team_size()
        self.forward: Any = model.forward
        self._length = getattr(cache, "max_cache_len", None)
        # The argument had another name before transformers 5.24.
        named = inspect.signature(model.forward).parameters
        self._argument = "cache" if "cache" in named else "past_key_values"
        self._inputs: dict[str, Any] = {"input_ids": torch.tensor([list(prompt)])}
        with torch.inference_mode():
            model.forward(**self._inputs, **{self._argument: cache}, use_cache=True, logits_to_keep=1)

    def prepare(self, draft: Draft) -> None:
        self._inputs = {"input_ids": torch.tensor([draft.tokens])}
        if draft.kind == "chain":
            return
        depths, ancestors = np.zeros(draft.size, np.int32), np.zeros(draft.size, np.int64)
        derive(np.array(draft.parents, np.int32), depths, ancestors)
        mask = torch.ones((1, 1, draft.size, self._context + draft.size), dtype=torch.bool)
        sees = (ancestors[:, None] >> np.arange(draft.size)[None]) & 1
        mask[0, 0, :, self._context :] = torch.from_numpy(sees == 1)
        self._inputs["attention_mask"] = mask
        self._inputs["position_ids"] = torch.from_numpy(depths.astype(np.int64))[None] + self._context

    @torch.inference_mode()
    def step(self) -> Any:
        output = self.forward(**self._inputs, **{self._argument: self._cache}, use_cache=True)
        return output.logits[0].argmax(-1).tolist()

    def won(self, draft: Draft, result: Any) -> list[int]:
        trees = draft.fill(DraftTrees.allocate(1))
        return walk(trees, 0, lambda node, path: result[node])[0]

    def restore(self, draft: Draft) -> None:
        """What the step wrote is taken back."""
        if self._length is None:
            self._cache.crop(-draft.size)
            return
        for layer in self._cache.layers:
            layer.cumulative_length.sub_(draft.size)


def load_theirs(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
    )
    return model.eval().requires_grad_(False)


def theirs_eager(folder: str, dtype: torch.dtype, prompt: Sequence[int]) -> Theirs:
    model: Any = load_theirs(folder, dtype)
    return Theirs("tf-eager", model, DynamicCache(config=model.config), prompt)


def theirs_compiled(folder: str, dtype: torch.dtype, prompt: Sequence[int]) -> Theirs:
    """One graph for each size of a draft, as `generate` would compile it; chains only."""
    model: Any = load_theirs(folder, dtype)
    cache = StaticCache(config=model.config, max_cache_len=len(prompt) + MAX_TREE_NODES)
    arm = Theirs("tf-compiled", model, cache, prompt)
    torch._dynamo.config.recompile_limit = 64
    arm.forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    return arm
