"""The back end of a GPU: inputs in one copy, the pass, the walk, one read. From a recording where there is one.

The host waits once, for what was won; it waits again only for rows with penalties, whose next token depends on counts
that it keeps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks, walk_levels
from verifier.attention import PlannedAttention
from verifier.backend import Loaded
from verifier.cuda.accept import DRAWN, GREEDY, Judgement, judge, judge_lists, path_of
from verifier.cuda.attention import TritonAttention
from verifier.cuda.graphs import MAX_POSITIONS, POSITIONS, Bucket, Graphs, Recording
from verifier.cuda.inputs import DeviceInputs, StepInputs
from verifier.cuda.layers import CompiledLayers, CompileError
from verifier.cuda.recorder import Recorder, make_recorder
from verifier.cuda.report import LogprobRequest, candidates_of, read_back
from verifier.cuda.sampling import choose_device, is_processed
from verifier.model import Pass, Target
from verifier.options import VerifierOptions
from verifier.plan import NOTHING, StepPlan, Wanted
from verifier.step import PackedStep
from verifier.torch.backend import TorchBackend
from verifier.tree import DraftTrees
from verifier.verdict import Hidden, TokenLogprobs, Verdict

_FEW_LOGITS = 64

logger = logging.getLogger(__name__)


class CudaBackend(TorchBackend):
    """Runs steps by kernels of ours; on a CPU by Triton's interpreter, for tests.

    Owns the steps' inputs, the compiled layers, the recordings and the memory into which these put their results.
    """

    name = "cuda"

    def __init__(
        self, loaded: Loaded, attention: TritonAttention, options: VerifierOptions, recorder: Recorder | None = None
    ) -> None:
        """`recorder` is for devices that have none of their own."""
        super().__init__(loaded, attention, inputs_device="cpu")  # they are brought to the device here
        self._kernels = attention
        geometry = self.geometry
        is_compiled = options.is_compiled and not options.is_eager
        self._layers = self._compile(loaded.attention_names) if is_compiled else None
        self.is_compiled = self._layers is not None
        self._quick: CompiledLayers | Target = self._layers or self._target
        self._recorder = None if options.is_eager else recorder or make_recorder(geometry.device)
        self._inputs = StepInputs(torch.device(geometry.device))
        self._logits: dict[int, torch.Tensor] = {}  # by number of places: [places, V] float32
        self._states: torch.Tensor | None = None  # [N, H] in the model's type
        self._judged: dict[Bucket, Judgement] = {}
        self._graphs: Graphs | None = None
        if (made := self._recorder) is not None:
            self.step_sizes = POSITIONS
            self._graphs = Graphs(self._record, lambda: made.has_room, (geometry.max_rows, geometry.max_positions))

    def _compile(self, names: Sequence[str]) -> CompiledLayers | None:
        try:
            return CompiledLayers(self._target, names, self.geometry.vocab_size)
        except CompileError as error:
            logger.warning("the forward pass is not compiled: %s", error)
            return None

    @property
    def num_recorded(self) -> int:
        """How many step sizes are recorded (see verifier.cuda.graphs)."""
        return 0 if self._graphs is None else len(self._graphs.buckets)

    @torch.inference_mode()
    def prepare_first(self) -> None:
        """Record the step sizes that readiness waits for."""
        if self._graphs is not None:
            self._graphs.prepare_first()

    @torch.inference_mode()
    def warm(self, *, is_idle: bool) -> bool:
        """Record one more step size."""
        return self._graphs is not None and self._graphs.prepare_more(is_idle=is_idle)

    @torch.inference_mode()
    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted = NOTHING) -> Verdict:
        """See Backend."""
        step = self._begin(plan, trees, wanted.hidden_tail)
        walks = Walks.make(trees, step, [chunk.row for chunk in plan.chunks if chunk.is_last])
        recording = None
        if self._graphs is not None and not step.num_scored:  # recordings have logits of chosen tokens alone
            recording = self._graphs.find(step.num_positions, step.rows.shape[0], step.num_logits)
        size = None if recording is None else recording.bucket.size_class
        inputs = self._inputs.take(step, walks, self._rows, size)
        planned = self._kernels.plan(step, size)
        began = time.perf_counter()
        if recording is None:
            told, states = self._forward(step, planned)
            logits, chunk_starts = told[: step.num_logits].float(), step.chunk_starts
        else:
            recording.forward()
            told = logits = self._logits_of(recording.bucket)[: step.num_logits]
            # A recording keeps the states of all positions.
            states = None if self._states is None else self._states[: step.num_positions]
            chunk_starts = step.starts[step.num_trees :]
        forward_s = time.perf_counter() - began
        hidden = Hidden(states, chunk_starts) if wanted.hidden_tail and states is not None else None
        masked = logits
        if wanted.masks is not None:  # what is recorded reads the logits where they are
            masked, recording = wanted.masks.apply(logits), None
        judged = self._walk(recording, masked, inputs, walks)
        if judged is None:
            verdict = _nothing(walks, hidden, forward_s)
        else:
            verdict = self._report(step, walks, (wanted.num_candidates, hidden, forward_s), (logits, masked, judged))
        return self._with_scores(verdict, plan, step, told)

    def _forward(self, step: PackedStep, planned: PlannedAttention) -> Pass:
        kept = step.num_logits + step.num_scored
        return self._quick(step.input_ids, step.position_ids, planned, step.logits_index, kept)

    def _walk(
        self, recording: Recording | None, logits: torch.Tensor, inputs: DeviceInputs, walks: Walks
    ) -> Judgement | None:
        """Choose and walk, from the recording where neither bias nor penalties stand in the way; None without trees."""
        if not walks.rows.size:
            return None
        state = self._rows
        records, roots = state.records[walks.rows], walks.positions[walks.starts[:-1]]
        if recording is None or is_processed(records, roots).any():
            return judge_lists(logits, inputs, walks, state, self._pool)
        (recording.judge_drawn if (records["temperature"] > 0).any() else recording.judge_greedy)()
        return self._judged[recording.bucket]

    def _report(
        self,
        step: PackedStep,
        walks: Walks,
        told: tuple[int, Hidden | None, float],
        found: tuple[torch.Tensor, torch.Tensor, Judgement],
    ) -> Verdict:
        """Read what was won, and what else is to be told of it.

        `found`: logits, those that were chosen from, and the choice.
        """
        (num_candidates, hidden, forward_s), (logits, masked, judged) = told, found
        rows, num_nodes = self._rows, int(step.starts[step.num_trees])
        num_logprobs, is_counted = rows.num_logprobs[walks.rows], rows.records["has_penalties"][walks.rows]
        asked = LogprobRequest(walks, num_logprobs, np.flatnonzero((num_logprobs >= 0) & ~is_counted))
        best = candidates_of(logits[:num_nodes], num_candidates) if num_candidates and num_nodes else []
        more = asked.ask(logits, judged.chosen)
        arrays = read_back([judged.won, *best, *more])  # the host waits here
        path = path_of(arrays[0], walks)
        logprobs = asked.answer(arrays[1 + len(best) :], path)
        if is_counted.any():
            logprobs |= self._walk_counted(step, walks, (logits, masked), (path, is_counted, num_logprobs))
        return Verdict(
            rows=walks.rows,
            tokens=path.tokens,
            num_accepted=np.maximum(path.num_accepted, 0),
            nodes=path.nodes,
            failed=tuple(walks.rows[path.num_accepted < 0].tolist()),
            logprobs=logprobs,
            candidates=arrays[1] if best else None,
            candidate_logits=arrays[2] if best else None,
            hidden=hidden,
            forward_s=forward_s,
        )

    def _walk_counted(
        self,
        step: PackedStep,
        walks: Walks,
        found: tuple[torch.Tensor, torch.Tensor],
        task: tuple[Path, NDArray[np.bool_], NDArray[np.int32]],
    ) -> dict[int, list[TokenLogprobs]]:
        """Walk rows with penalties, level by level. Fills their part of the path; returns their log-probabilities."""
        (path, is_counted, num_logprobs), (logits, masked) = task, found
        trees = np.flatnonzero(is_counted)
        walk_levels(masked, walks, self._rows, (choose_device, path, trees.tolist()))
        self._move(np.where(is_counted, path.num_accepted, 0).astype(np.int32), path, step)
        asked = LogprobRequest(walks, num_logprobs, trees[num_logprobs[trees] >= 0])
        if not asked.nodes.size:
            return {}
        chosen = np.full(walks.tokens.shape[0], -1, np.int64)
        for tree in trees.tolist():
            count = int(path.num_accepted[tree])
            nodes = walks.starts[tree] + np.array([0, *path.nodes[tree, : max(count, 0)]])
            chosen[nodes] = path.tokens[tree, : nodes.size]
        return asked.answer(read_back(asked.ask(logits, torch.from_numpy(chosen).to(logits.device))), path)

    def _record(self, bucket: Bucket) -> Recording:
        """Record a bucket over a step that is nothing but padding."""
        inputs, recorder = self._inputs.of(bucket.size_class), self._recorder
        assert recorder is not None, "a recording without a recorder"
        inputs.clear()
        arrays = inputs.arrays
        num_positions, num_logits = bucket.num_positions, bucket.num_logits
        planned = self._kernels.plan_nothing(bucket.size_class, self._buffers, arrays.write_slots[:num_positions])
        ids, positions = arrays.input_ids[None, :num_positions], arrays.position_ids[None, :num_positions]
        kept, logits = arrays.logits_index[:num_logits], self._logits_of(bucket)
        judged = self._judged[bucket] = Judgement(
            arrays.tokens.new_empty((bucket.num_segments, 2 * bucket.depth + 2)), arrays.tokens.new_empty(num_logits)
        )

        def forward() -> None:
            found, states = self._quick(ids, positions, planned, None, kept)
            if states is not None:
                self._states_like(states)[:num_positions].copy_(states)
            else:
                found = found.index_select(0, kept)
            logits.copy_(found)

        def judging(flags: tuple[bool, bool]) -> Callable[[], None]:
            return recorder.record(lambda: judge(logits, arrays, flags, self._pool, judged))

        return Recording(bucket, recorder.record(forward), judging(GREEDY), judging(DRAWN))

    def _logits_of(self, bucket: Bucket) -> torch.Tensor:
        """Where the recordings of a bucket put logits [K, V] float32: shared by all, small ones apart from large ones.

        A large vocabulary needs hundreds of megabytes for the many; small steps shall not wait for that.
        """
        room = _FEW_LOGITS if bucket.num_logits <= _FEW_LOGITS else MAX_POSITIONS
        if room not in self._logits:
            self._logits[room] = torch.empty((room, self.geometry.vocab_size), device=self.geometry.device)
        return self._logits[room][: bucket.num_logits]

    def _states_like(self, states: torch.Tensor) -> torch.Tensor:
        """Where recordings put states, made on the first trial run of the first one."""
        if self._states is None:
            self._states = states.new_empty((MAX_POSITIONS, states.shape[1]))
        return self._states


def _nothing(walks: Walks, hidden: Hidden | None, forward_s: float) -> Verdict:
    """Of a step in which no row could win a token: the host does not wait for it."""
    path = Path.make(walks)
    return Verdict(walks.rows, path.tokens, path.num_accepted, path.nodes, hidden=hidden, forward_s=forward_s)
