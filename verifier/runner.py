"""The verifier: one object that runs steps. Owns the weights, the K/V pool, the static inputs and the sampling state.

A step is: apply the plan's changes, pack, one forward pass, choose along the trees, move accepted K/V. It knows nothing
about requests, text or clients. Invariant after a step: the K/V of every row are right for all its tokens but the last.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from verifier.accept import Path, Walks, accept_device, accept_host
from verifier.attention import LayerKV, PlannedAttention
from verifier.backend import Backend, load_backend
from verifier.cpu.fused import quicken, release
from verifier.cpu.threads import num_compute_threads
from verifier.cuda.parts import DeviceParts
from verifier.cuda.recorder import Recorder, make_recorder
from verifier.host_sampling import top_candidates
from verifier.jit import jit
from verifier.kv import KVPool
from verifier.model import KV_ATTRIBUTE, ModelError, Pass, Target, attention_modules, load_network
from verifier.options import DTYPES, VerifierOptions, choose_device, choose_dtype, plan_memory
from verifier.parallel.ranks import Seat, start_ranks, take_part
from verifier.parallel.wire import Told
from verifier.plan import NOTHING, StepPlan, Wanted
from verifier.probe import ProbeReport, probe
from verifier.quantization import check_loaded
from verifier.rows import SamplingRows
from verifier.step import PackedStep, StepBuffers
from verifier.tree import DraftTrees
from verifier.verdict import Hidden, TokenLogprobs, Verdict
from verifier.weights import SharedWeights, shared_weights

if TYPE_CHECKING:
    from verifier.cuda.layers import CompiledLayers

logger = logging.getLogger(__name__)


class Verifier:
    """Loads a model and verifies trees on it.

    Raises: ModelError with one clear line if the model is broken, unsupported, or does not fit.
    """

    def __init__(
        self,
        options: VerifierOptions,
        recorder: Recorder | None = None,
        network: torch.nn.Module | None = None,
        seat: Seat | None = None,
    ) -> None:
        """`recorder` is for devices that have none of their own: see verifier.cuda.recorder.

        `network` is used in place of the weights in the model's folder, of which only config.json is then read; it must
        lie on the device, in the dtype, and dispatch to verifier.model.attend. `seat` is that of a rank which rank 0
        has started.
        """
        self._device, size = choose_device(options.device), options.tensor_parallel_size
        if self._device == "cpu":
            torch.set_num_threads(max(1, (options.threads or num_compute_threads()) // size))
        self._backend = load_backend(options.attention, self._device)
        report = probe(options.model, options.revision)
        if report.refusals:
            raise ModelError(f"{options.model} cannot be served: {'; '.join(report.refusals)}")
        self._ranks = start_ranks(options, report, self._device) if seat is None else None
        seat = seat or self._ranks
        if self._ranks is not None:
            self._end_ranks = weakref.finalize(self, self._ranks.close)
        dtype_name = choose_dtype(options.dtype, self._device, report)
        if network is None:
            loaded_to = "cpu" if seat else self._device
            is_placed = report.quantization is not None and loaded_to != "cpu"
            network = load_network(options.model, options.revision, DTYPES[dtype_name], loaded_to, is_placed)
        self._network = network
        if report.quantization is not None:
            check_loaded(self._network, report.quantization.method, DTYPES[dtype_name])
        if seat is not None:
            report = take_part(seat, self._network, report, self._device)
            self._backend = Backend(self._backend.attention, self._backend.mover)  # each rank moves its K/V when told
        self._target = Target(self._network)
        place = dtype_name, self._device
        self.geometry = plan_memory(options, report, place, seat.meet) if seat else plan_memory(options, report, place)
        self._pool = KVPool(
            report.layers,
            self.geometry.num_pages,
            options.page_size,
            DTYPES[dtype_name],
            self._device,
            self._backend.mover,
        )
        self._attach(report)
        self._layers = self._quicken(options, report)
        geometry, make_steps = self.geometry, self._backend.make_steps
        self._buffers = StepBuffers(
            geometry.max_rows,
            geometry.max_positions,
            geometry.max_model_len,
            geometry.page_size,
            "cpu" if make_steps else self._device,  # who runs whole steps brings their inputs to the device
        )
        self._rows = SamplingRows(geometry.max_rows, geometry.vocab_size)
        self._steps = make_steps(self._parts(recorder, options.is_eager)) if make_steps else None
        if seat is not None:
            seat.begin()

    def close(self) -> None:
        """End the other ranks, if there are any; nothing can be run afterwards."""
        if self._ranks is not None:
            self._end_ranks()

    def _parts(self, recorder: Recorder | None, is_eager: bool) -> DeviceParts:
        return DeviceParts(
            pool=self._pool,
            rows=self._rows,
            buffers=self._buffers,
            network=self._layers or self._target,
            forward=self._forward,
            move=self._move,
            recorder=None if is_eager else recorder or make_recorder(self._device),
            device=torch.device(self._device),
            vocab_size=self.geometry.vocab_size,
        )

    def _attach(self, report: ProbeReport) -> None:
        """Give every attention module its part of the pool."""
        modules = attention_modules(self._network, [layer.name for layer in report.layers])
        for index, (module, layer) in enumerate(zip(modules, report.layers, strict=True)):
            k, v = self._pool.layer(index)
            setattr(module, KV_ATTRIBUTE, LayerKV(k, v, layer))

    def _quicken(self, options: VerifierOptions, report: ProbeReport) -> CompiledLayers | None:
        """Let the network run quicker code than transformers' own where that gives the same: on a GPU its compiled
        layers, which are returned; on a CPU its modules change."""
        if not options.is_compiled or options.is_eager or options.tensor_parallel_size > 1:
            return None
        if self._device == "cpu" and self._backend.make_steps is None:
            quicken(self._network)
            release(self._network)
            return None
        from verifier.cuda.layers import CompiledLayers, CompileError  # here: it imports torch's compiler, for seconds

        try:
            return CompiledLayers(self._target, [layer.name for layer in report.layers], report.vocab_size)
        except CompileError as error:
            logger.warning("the forward pass is not compiled: %s", error)
            return None

    @property
    def is_compiled(self) -> bool:
        """Whether the layers are compiled."""
        return self._layers is not None

    @property
    def shared_weights(self) -> SharedWeights:
        """The target's own embeddings, for a drafter that reads them. Raises: ModelError if it has none to show."""
        if self._ranks is not None:
            self._ranks.show_weights()
        return shared_weights(self._network, self.geometry.vocab_size)

    @torch.inference_mode()
    def run(self, plan: StepPlan, trees: DraftTrees, wanted: Wanted = NOTHING) -> Verdict:
        """Run one step.

        Args: `trees` holds tree i of plan.trees[i]; `wanted` is what to tell beside the tokens. Returns: what each row
        won (see Verdict).
        """
        for start in plan.starts:
            self._rows.start(start)
        self._buffers.write_pages(plan.pages)
        if self._ranks is not None:
            self._ranks.note_pages(plan.pages)
        step = self._buffers.pack(plan, trees, wanted.hidden_tail)
        if self._steps is not None:
            ends = [chunk.row for chunk in plan.chunks if chunk.is_last]
            return self._steps.run(step, Walks.make(trees, step, ends), wanted)
        began = time.perf_counter()
        planned = self._backend.attention.plan(step)
        with self._ranks.leading(Told(plan, trees, wanted.hidden_tail)) if self._ranks else contextlib.nullcontext():
            logits, states = self._forward(step, planned)
        forward_s = time.perf_counter() - began
        hidden = Hidden(states, step.chunk_starts) if wanted.hidden_tail and states is not None else None
        extra = (wanted.num_candidates, hidden, forward_s)
        return self._judge(plan, trees, step, logits[: step.num_logits].float(), extra)

    def follow(self, told: Told) -> None:
        """Run this rank's part of a pass of rank 0."""
        self._buffers.write_pages(told.plan.pages)
        step = self._buffers.pack(told.plan, told.trees, told.hidden_tail)
        self._forward(step, self._backend.attention.plan(step))

    def follow_move(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Move what rank 0 accepted from slots [m] to slots [m]."""
        self._pool.move(torch.tensor(sources, device=self._device), torch.tensor(targets, device=self._device))

    @property
    def num_recorded(self) -> int:
        """How many step sizes are recorded (see verifier.cuda.graphs)."""
        return 0 if self._steps is None or self._steps.graphs is None else len(self._steps.graphs.buckets)

    @torch.inference_mode()
    def prepare_first(self) -> None:
        """Record the step sizes that readiness waits for, if steps are recorded at all."""
        if self._steps is not None and self._steps.graphs is not None:
            self._steps.graphs.prepare_first()

    @torch.inference_mode()
    def prepare_more(self, is_idle: bool) -> bool:
        """Record one more step size, between steps. Returns: whether to call again when idle.

        As after a step, hidden states told before are not valid any more.
        """
        if self._steps is None or self._steps.graphs is None:
            return False
        return self._steps.graphs.prepare_more(is_idle=is_idle)

    def _forward(self, step: PackedStep, planned: PlannedAttention) -> Pass:
        network = self._layers or self._target
        return network(step.input_ids, step.position_ids, planned, step.logits_index, step.num_logits)

    def _judge(
        self,
        plan: StepPlan,
        trees: DraftTrees,
        step: PackedStep,
        logits: torch.Tensor,
        extra: tuple[int, Hidden | None, float],
    ) -> Verdict:
        """From logits [K, V] float32 to the verdict, and the K/V to their places."""
        num_candidates, hidden, forward_s = extra
        walks = Walks.make(trees, step, [chunk.row for chunk in plan.chunks if chunk.is_last])
        num_nodes = trees.num_nodes
        candidates = values = best = None
        if num_candidates and num_nodes:
            candidates, values = self._candidates(logits[:num_nodes], num_candidates)
        if logits.device.type == "cpu":
            best = None if candidates is None else np.ascontiguousarray(candidates[:, 0])
            path = accept_host(logits.numpy(), walks, self._rows, best)
        else:
            path = accept_device(logits, walks, self._rows)
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

    def _candidates(self, logits: torch.Tensor, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The `count` best tokens at each of the tree nodes [N, V], and their raw logits."""
        count = min(count, logits.shape[1])
        if logits.device.type != "cpu":
            best = logits.topk(count, dim=-1)
            return best.indices.int().cpu().numpy(), best.values.cpu().numpy()
        array = logits.numpy()
        tokens = np.empty((array.shape[0], count), np.int32)
        values = np.empty((array.shape[0], count), np.float32)
        top_candidates(array, array.view(np.int32), tokens, values)
        return tokens, values

    def _move(self, num_to_move: NDArray[np.int32], path: Path, step: PackedStep) -> None:
        """Accepted nodes sit where the tree put them; their place is the row's next contiguous slots.

        Args: `num_to_move` [S] of each tree's accepted nodes.
        """
        sources, targets = _moves(
            (step.rows, step.prefix_lens),
            (num_to_move, path.nodes),
            step.num_trees,
            (step.page_table, step.page_size),
        )
        if sources.size:
            if self._ranks is not None:
                self._ranks.move(sources, targets)
            device = self._device
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


@jit()
def _moves(places, path, num_trees, table):  # type: ignore[no-untyped-def]
    """Slots to copy from and to, for accepted nodes that do not already lie at their depth."""
    rows, prefix_lens = places
    num_accepted, nodes = path
    page_table, page_size = table
    sources = np.empty(nodes.size, np.int64)
    targets = np.empty(nodes.size, np.int64)
    count = 0
    for tree in range(num_trees):
        for level in range(num_accepted[tree]):
            node, depth = nodes[tree, level], level + 1
            if node != depth:
                source, target = prefix_lens[tree] + node, prefix_lens[tree] + depth
                pages = page_table[rows[tree]]
                sources[count] = np.int64(pages[source // page_size]) * page_size + source % page_size
                targets[count] = np.int64(pages[target // page_size]) * page_size + target % page_size
                count += 1
    return sources[:count], targets[:count]
