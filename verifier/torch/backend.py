"""The portable back end: plain torch, on any device, ready as soon as the weights are read. The others' oracle."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks
from verifier.attention import PlannedAttention, TreeAttention
from verifier.backend import Backend, Loaded
from verifier.model import Pass
from verifier.plan import NOTHING, StepPlan, Wanted
from verifier.scores import score_chunks
from verifier.step import PackedStep
from verifier.torch.accept import TorchWalker, Walker
from verifier.tree import DraftTrees
from verifier.verdict import Hidden, TokenLogprobs, Verdict

Int64 = NDArray[np.int64]


class TorchBackend(Backend):
    """Runs the network as transformers wrote it. Owns the attention and the walker beside what every back end owns."""

    name = "torch"

    def __init__(self, loaded: Loaded, attention: TreeAttention, inputs_device: str = "") -> None:
        super().__init__(loaded, inputs_device or loaded.geometry.device)
        self._attention = attention
        self._walker: Walker = TorchWalker(self._rows)

    @torch.inference_mode()
    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted = NOTHING) -> Verdict:
        """See Backend."""
        step = self._begin(plan, trees, wanted.hidden_tail)
        began = time.perf_counter()
        logits, states = self._forward(step, self._attention.plan(step))
        forward_s = time.perf_counter() - began
        hidden = Hidden(states, step.chunk_starts) if wanted.hidden_tail and states is not None else None
        walks = Walks.make(trees, step, [chunk.row for chunk in plan.chunks if chunk.is_last])
        verdict = self._judge(step, walks, self._widen(logits[: step.num_logits]), (wanted, hidden, forward_s))
        return self._with_scores(verdict, plan, step, logits)

    def _forward(self, step: PackedStep, planned: PlannedAttention) -> Pass:
        kept = step.num_logits + step.num_scored
        return self._target(step.input_ids, step.position_ids, planned, step.logits_index, kept)

    def _with_scores(self, verdict: Verdict, plan: StepPlan, step: PackedStep, logits: torch.Tensor) -> Verdict:
        """The verdict with the scores of prompts, from all logits [K + S, V] of the pass."""
        if not step.num_scored:
            return verdict
        scored = logits[step.num_logits : step.num_logits + step.num_scored]
        return replace(verdict, scores=score_chunks(scored, plan))

    def _widen(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in float32."""
        return logits.float()

    def _judge(
        self, step: PackedStep, walks: Walks, logits: torch.Tensor, extra: tuple[Wanted, Hidden | None, float]
    ) -> Verdict:
        """From logits [K, V] float32 to the verdict, and the K/V to their places."""
        wanted, hidden, forward_s = extra
        num_nodes, num_candidates = int(step.starts[step.num_trees]), wanted.num_candidates
        candidates = values = None
        if num_candidates and num_nodes:
            candidates, values = self._walker.candidates(logits[:num_nodes], min(num_candidates, logits.shape[1]))
        if wanted.masks is not None:
            path = self._walker.accept(wanted.masks.apply(logits), walks, None)
        else:
            best = None if candidates is None else np.ascontiguousarray(candidates[:, 0])
            path = self._walker.accept(logits, walks, best)
        self._move(path.num_accepted, path, step)
        return Verdict(
            rows=walks.rows,
            tokens=path.tokens,
            num_accepted=np.maximum(path.num_accepted, 0),
            nodes=path.nodes,
            failed=tuple(walks.rows[path.num_accepted < 0].tolist()),
            logprobs=self._logprobs(logits, walks, path),
            candidates=candidates,
            candidate_logits=values,
            hidden=hidden,
            forward_s=forward_s,
        )

    def _move(self, num_to_move: NDArray[np.int32], path: Path, step: PackedStep) -> None:
        """Accepted nodes sit where the tree put them; their place is the row's next contiguous slots.

        Args: `num_to_move` [S] of each tree's accepted nodes.
        """
        sources, targets = _moves(step, num_to_move[: step.num_trees], path.nodes)
        if sources.size:
            self._move_slots(sources, targets)

    def _move_slots(self, sources: Int64, targets: Int64) -> None:
        device = self.geometry.device
        self._pool.move(torch.from_numpy(sources).to(device), torch.from_numpy(targets).to(device))

    def _logprobs(self, logits: torch.Tensor, walks: Walks, path: Path) -> dict[int, list[TokenLogprobs]]:
        """Raw log-probabilities of the won tokens, for rows that asked, by index of the walk."""
        found: dict[int, list[TokenLogprobs]] = {}
        wanted = self._rows.num_logprobs[walks.rows]
        if not (wanted >= 0).any():
            return found
        for tree in np.flatnonzero((wanted >= 0) & (path.num_accepted >= 0)).tolist():
            count, start = min(int(wanted[tree]), logits.shape[1]), int(walks.starts[tree])
            accepted = int(path.num_accepted[tree])
            nodes = [start, *(start + path.nodes[tree, :accepted]).tolist()]
            raw = torch.log_softmax(logits[nodes].double(), dim=-1)
            won = path.tokens[tree, : accepted + 1].tolist()
            best = raw.topk(count, dim=-1) if count else None
            found[tree] = [
                TokenLogprobs(
                    raw[place, token].item(),
                    ()
                    if best is None
                    else tuple(zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)),
                )
                for place, token in enumerate(won)
            ]
        return found


def _moves(step: PackedStep, num_accepted: NDArray[np.int32], nodes: NDArray[np.int32]) -> tuple[Int64, Int64]:
    """Slots to copy from and to, for accepted nodes that do not already lie at their depth."""
    trees, levels = np.nonzero(np.arange(nodes.shape[1]) < num_accepted[:, None])
    sources, targets = nodes[trees, levels], levels + 1
    is_moved = sources != targets
    trees = trees[is_moved]
    return _slots(step, trees, sources[is_moved]), _slots(step, trees, targets[is_moved])


def _slots(step: PackedStep, trees: Int64, places: NDArray[np.int32] | Int64) -> Int64:
    """Slots of places behind the prefixes of trees."""
    at = step.prefix_lens[trees] + places.astype(np.int64)
    found: Int64 = step.page_table[step.rows[trees], at // step.page_size].astype(np.int64) * step.page_size
    return found + at % step.page_size
