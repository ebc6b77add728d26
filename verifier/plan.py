"""What the verifier can be asked to do: sampling parameters, prompt chunks, one step's plan.

Frozen values without torch, so that the scheduler and the HTTP side can build them. Index spaces:
`row` is the seat a running request keeps, `position` counts tokens of a sequence from 0, `page` is a
block of K/V memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verifier.masks import TokenMasks

MAX_TREE_NODES = 64
"""Most nodes of one tree, root included: ancestors are one int64 bitset per node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, for one sequence.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and the neutral penalties switch a
    processor off. `stop_ids` end the answer; before `min_tokens` answer tokens they cannot be
    chosen. `num_logprobs` is -1 for none, else how many alternatives to report at every token.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    num_logprobs: int = -1

    @property
    def is_greedy(self) -> bool:
        """Whether the noise is left out."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class RowStart:
    """A sequence now lives in `row`: new, back from preemption, or resumed after a worker's death."""

    row: int
    tokens: tuple[int, ...]
    """Prompt and answer so far."""
    num_prompt: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of known tokens to run through the model at positions num_cached, num_cached + 1, ..."""

    row: int
    num_cached: int
    tokens: tuple[int, ...]
    is_last: bool
    """After the last chunk the row wins its first token of this residence."""
    targets: tuple[int, ...] = ()
    """The tokens that follow the first positions of the chunk, whose log-probabilities are asked for."""
    num_alternatives: int = 0
    """How many of the target's best tokens to report at each of these positions."""


@dataclass(frozen=True, slots=True)
class TreeSlot:
    """A row that verifies a draft tree in this step; the root is its last token, at position num_cached."""

    row: int
    num_cached: int
    max_nodes: int
    """Most nodes of the tree, root included; 1 is plain decoding."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: any mix of chunks and trees.

    `stops` are rows that are free since the last plan; after a run that raised, also rows that are told again from
    their start, whether or not they had been started. The verifier applies `starts`, then `pages` ((row, index, page)
    writes into the page table), then runs trees and chunks in one packed pass. The tree of trees[i] is tree i of the
    DraftTrees given along.
    """

    starts: tuple[RowStart, ...] = ()
    stops: tuple[int, ...] = ()
    pages: tuple[tuple[int, int, int], ...] = ()
    trees: tuple[TreeSlot, ...] = ()
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a step shall tell beside the tokens it won, where 0 is nothing; and which tokens these may be."""

    num_candidates: int = 0
    """How many of the target's best tokens to report at every tree node."""
    hidden_tail: int = 0
    """n > 0 asks for the final hidden states of all tree nodes and of the last n positions of every chunk, also of
    chunks that are not last."""
    masks: TokenMasks | None = None
    """Which tokens may be chosen, where it is not all of them. A place at which none may be fails its row."""


NOTHING = Wanted()
"""The tokens and no more."""
