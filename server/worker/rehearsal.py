"""Every compiled Python function is used once, for nobody: none is compiled or loaded in the middle of an answer.

Compiling takes half a minute of a processor, once for each version of the sources; what was compiled is kept on disk
(verifier.jit). `python -m server.worker.rehearsal` compiles in a process of its own, beside a worker that serves;
loading what it left takes about a second, a bit at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from drafters.base import NOBODY, Drafter
from server.messages import Speculation, Submit
from server.worker.drafting import Drafting
from server.worker.loop import Loop
from server.worker.roster import Limits
from server.worker.scheduler import Scheduler
from server.worker.speculator import Speculator
from server.worker.step_cost import Profile, StepCost, StepSample
from server.worker.trials import TRIALS
from verifier.attention import PlannedAttention
from verifier.backend import Loaded
from verifier.cpu.accept import HostWalker
from verifier.jit import code_folder, machine
from verifier.kv import KVPool
from verifier.model import Pass
from verifier.options import VerifierGeometry
from verifier.parent import die_with_parent
from verifier.plan import MAX_TREE_NODES, SamplingParams
from verifier.probe import LayerGeometry
from verifier.step import PackedStep
from verifier.torch.backend import TorchBackend

_NUM_ROWS, _MAX_TOKENS = 4, 24
_PROMPT = (3, 5, 7, 3, 5, 7, 3, 5)
"""It repeats itself, so that there is something to copy."""
_FEW_TOKENS = 16
"""Tokens that the toy target says: so few that drafts come true."""
_TOY_VOCAB, _TOY_WIDTH = 256, 32
_COSTS = Profile((StepSample(1, 1, 1.0), StepSample(64, 1, 1.001), StepSample(64, 4, 1.002)))
"""Drafts are as good as free."""


class _Nothing(torch.nn.Module):
    """A network that is never run."""

    def get_output_embeddings(self) -> None:
        """It has none."""


class _NoAttention:
    def plan(self, step: PackedStep) -> Any:
        """Nothing is attended."""


class _Toy(TorchBackend):
    """A target that says a few tokens at random. Owns where it draws from."""

    name = "toy"

    def __init__(self, num_rows: int, vocab_size: int, width: int) -> None:
        geometry = VerifierGeometry(
            max_model_len=64, vocab_size=vocab_size, num_pages=4 * num_rows + 1, page_size=16, max_rows=num_rows,
            max_positions=num_rows * MAX_TREE_NODES, device="cpu", dtype="float32",
        )  # fmt: skip
        layer = LayerGeometry("toy", 1, 1, 1, 1, 1.0, None, None, False)
        pool = KVPool((layer,), geometry.num_pages, geometry.page_size, torch.float32, "cpu")
        loaded = Loaded(network=_Nothing(), attention_names=(), pool=pool, geometry=geometry)
        super().__init__(loaded, _NoAttention())
        self._walker = HostWalker(self._rows)
        self._stream = torch.Generator().manual_seed(0)
        self._width = width

    def _forward(self, step: PackedStep, planned: PlannedAttention) -> Pass:
        logits = torch.zeros(step.num_logits, self.geometry.vocab_size)
        few = torch.randint(_FEW_TOKENS, (step.num_logits, 1), generator=self._stream)
        logits.scatter_(1, few % self.geometry.vocab_size, 20.0)
        num_states = step.num_positions if step.logits_index is None else step.logits_index.shape[0]
        return logits, torch.randn(num_states, self._width, generator=self._stream)


def rehearse(drafters: Mapping[str, Drafter], vocab_size: int, max_rows: int, width: int) -> Iterator[None]:
    """Answer some requests of nobody with these drafters, which nobody else may use meanwhile; a step at a time.

    Args: `width` of the hidden states that they are told. Nothing stays of it: drafters forget what NOBODY taught.
    """
    num_rows = min(_NUM_ROWS, max_rows)
    toy = _Toy(num_rows, vocab_size, width)
    geometry = toy.geometry
    limits = Limits(
        max_rows=num_rows, max_batched_tokens=geometry.max_positions, max_model_len=geometry.max_model_len,
        num_pages=geometry.num_pages, page_size=geometry.page_size,
    )  # fmt: skip
    drafting = Drafting(drafters, max_rows=num_rows, vocab_size=vocab_size)
    loop = Loop(toy, Scheduler(limits), Speculator(drafting, num_rows), vocab_size)
    for costs in (None, _COSTS):
        if costs is not None:
            loop.speculator.begin(StepCost(costs, geometry.max_positions))
        for trial in TRIALS:
            sampling = SamplingParams(max_tokens=_MAX_TOKENS, seed=1, **trial)
            prompt = tuple(token % vocab_size for token in _PROMPT)
            for name in drafting.names:
                loop.handle(
                    Submit(name, prompt, sampling, Speculation(name, MAX_TREE_NODES), NOBODY, prediction=prompt)
                )
                loop.step()  # so that prompts run beside drafts
                yield
            while loop.has_work:
                loop.step()
                yield


COMMAND = (sys.executable, "-P", "-m", "server.worker.rehearsal")
"""Compiles it all, in a process of its own."""


def mark() -> Path | None:
    """The file that says that all of it lies on disk; None where nothing can be kept."""
    folder = code_folder()
    return None if folder is None else folder / f"rehearsed-{machine()}"


def main() -> int:
    """Compile all of it; returns the exit code."""
    die_with_parent()
    from drafters.drafter import DrafterOptions, TreeDrafter
    from drafters.head.head import Head, HeadShape
    from drafters.head.source import HeadSource
    from verifier.weights import SharedWeights

    shape = HeadShape(
        vocab_size=_TOY_VOCAB, embed_size=_TOY_WIDTH, hidden_size=_TOY_WIDTH, width=_TOY_WIDTH, ffn_size=_TOY_WIDTH
    )
    embedding = torch.zeros(_TOY_VOCAB, _TOY_WIDTH)
    head = HeadSource(Head(shape), SharedWeights(embedding, embedding, _TOY_WIDTH), max_rows=_NUM_ROWS)
    drafter = TreeDrafter(DrafterOptions(vocab_size=_TOY_VOCAB, max_rows=_NUM_ROWS), head)
    for _ in rehearse(drafter.views(), _TOY_VOCAB, _NUM_ROWS, _TOY_WIDTH):
        pass
    if (done := mark()) is not None:
        done.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
