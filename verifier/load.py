"""From options to a back end that runs: the device is chosen, the model loaded, its memory planned. Once, at start."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

import torch

from verifier.attention import LayerKV, TreeAttention
from verifier.backend import Backend, Loaded
from verifier.cpu.backend import CpuBackend
from verifier.cpu.build import NoLibrary, load_library
from verifier.cpu.products import multiplies_bfloat16
from verifier.cpu.threads import num_compute_threads, use_threads
from verifier.cuda.recorder import Recorder
from verifier.kv import KVPool, Mover, move_slots
from verifier.model import KV_ATTRIBUTE, ModelError, attention_modules, load_network
from verifier.options import DTYPES, VerifierOptions, choose_device, choose_dtype, plan_memory
from verifier.parallel.backend import LeadBackend
from verifier.parallel.ranks import Seat, start_ranks, take_part
from verifier.probe import ProbeReport, probe
from verifier.quantization import check_loaded
from verifier.seam import without_compiler
from verifier.torch.backend import TorchBackend

ATTENTIONS: dict[str, str] = {
    "native": "verifier.cpu.attention:NativeAttention",
    "sdpa": "verifier.torch.attention:SdpaAttention",
    "triton": "verifier.cuda.attention:TritonAttention",
}
"""Attention by name, each that of one back end: cpu, torch, cuda. Imported only when it is chosen."""

logger = logging.getLogger(__name__)


def load_backend(
    options: VerifierOptions, recorder: Recorder | None = None, network: torch.nn.Module | None = None
) -> Backend:
    """Load a model and what runs it.

    Args: `recorder` is for devices that have none of their own: see verifier.cuda.recorder. `network` is used in place
    of the weights in the model's folder, of which only config.json is then read; it must lie on the device, in the
    dtype, and dispatch to verifier.model.attend.
    Raises: ModelError with one clear line if the model is broken, unsupported, or does not fit.
    """
    device = take_device(options)
    attention = choose_attention(options.attention, device)
    if attention == "triton" or options.tensor_parallel_size > 1:
        return _load(options, (attention, device), recorder, network)
    with without_compiler():
        return _load(options, (attention, device), recorder, network)


def _load(
    options: VerifierOptions, place: tuple[str, str], recorder: Recorder | None, network: torch.nn.Module | None
) -> Backend:
    attention, device = place
    report = examine(options)
    if options.tensor_parallel_size > 1:
        return _load_split(options, report, attention, device)
    is_quick = options.is_compiled and not options.is_eager
    dtype = choose_dtype(options.dtype, device, report, attention == "native" and is_quick and multiplies_bfloat16())
    if network is None:
        network = load_network(options.model, options.revision, DTYPES[dtype], device)
    if report.quantization is not None:
        check_loaded(network, report.quantization.method, DTYPES[dtype])
    loaded = _attach(options, report, network, (dtype, device))
    if attention == "triton":
        module = importlib.import_module("verifier.cuda.backend")  # it needs triton, which not everybody has
        found: Backend = module.CudaBackend(loaded, make_attention(attention), options, recorder)
        return found
    if attention == "native":
        return CpuBackend(loaded, is_quick=is_quick)
    return TorchBackend(loaded, make_attention(attention))


def take_device(options: VerifierOptions) -> str:
    """The device, with the threads that compute on it set. Raises: ModelError."""
    device = choose_device(options.device)
    if device == "cpu":
        use_threads(max(1, (options.threads or num_compute_threads()) // options.tensor_parallel_size))
    return device


def examine(options: VerifierOptions) -> ProbeReport:
    """What the model is. Raises: ModelError if it cannot be served."""
    report = probe(options.model, options.revision)
    if report.refusals:
        raise ModelError(f"{options.model} cannot be served: {'; '.join(report.refusals)}")
    return report


def load_part(options: VerifierOptions, report: ProbeReport, device: str, seat: Seat) -> Loaded:
    """This rank's part of a model that is split. Raises: ModelError, RankLost."""
    dtype = choose_dtype(options.dtype, device, report)
    network = load_network(options.model, options.revision, DTYPES[dtype], "cpu")
    report = take_part(seat, network, report, device)
    return _attach(options, report, network, (dtype, device), seat.meet)


def _load_split(options: VerifierOptions, report: ProbeReport, attention: str, device: str) -> Backend:
    ranks = start_ranks(options, report, device)
    try:
        lead = LeadBackend(load_part(options, report, device, ranks), make_attention(attention), ranks)
        ranks.begin()
    except BaseException:
        ranks.close()
        raise
    return lead


def _attach(
    options: VerifierOptions,
    report: ProbeReport,
    network: torch.nn.Module,
    place: tuple[str, str],
    agree: Callable[[int], int] = lambda own: own,
) -> Loaded:
    """Give every attention module its part of a new pool. Args: `place` and `agree` as in plan_memory."""
    geometry = plan_memory(options, report, place, agree)
    dtype, device = place
    pool = KVPool(report.layers, geometry.num_pages, options.page_size, DTYPES[dtype], device, _mover(options, device))
    names = tuple(layer.name for layer in report.layers)
    for index, (module, layer) in enumerate(zip(attention_modules(network, names), report.layers, strict=True)):
        setattr(module, KV_ATTRIBUTE, LayerKV(*pool.layer(index), layer))
    return Loaded(network=network, attention_names=names, pool=pool, geometry=geometry)


def _mover(options: VerifierOptions, device: str) -> Mover:
    """What moves accepted K/V; the kernel's is recorded with a step, which a split model's steps are not."""
    if choose_attention(options.attention, device) != "triton" or options.tensor_parallel_size > 1:
        return move_slots
    moving: Mover = importlib.import_module("verifier.cuda.kernels.move").move
    return moving


def make_attention(name: str) -> TreeAttention:
    """An attention of ATTENTIONS."""
    module, class_name = ATTENTIONS[name].split(":")
    attention: TreeAttention = getattr(importlib.import_module(module), class_name)()
    return attention


def choose_attention(name: str, device: str) -> str:
    """What "auto" stands for: triton on a GPU where it is installed, native on a CPU with a compiler, else sdpa.

    Raises: ModelError if what was asked for by name cannot run here.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "auto" and device == "cuda":
        return "triton" if has_triton else "sdpa"
    if name == "auto":
        return _native_or_sdpa()
    if name == "native":
        _require_native(device)
    if name == "triton":
        if not has_triton:
            raise ModelError("attention triton was asked for, but the package triton is not installed")
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ModelError(
                "attention triton needs a CUDA device; with TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests"
            )
    return name


def build_ahead() -> None:
    """Compile what a machine without a GPU will want, in a process that waits for its model: seconds, once."""
    if not torch.cuda.is_available():
        with contextlib.suppress(NoLibrary):  # told when it is wanted
            load_library()


def _native_or_sdpa() -> str:
    try:
        load_library()
    except NoLibrary as error:
        logger.warning("the pass runs through torch, slower: %s", error)
        return "sdpa"
    return "native"


def _require_native(device: str) -> None:
    """Raises: ModelError."""
    if device != "cpu":
        raise ModelError(f"attention native runs on a CPU, not on {device}")
    try:
        load_library()
    except NoLibrary as error:
        raise ModelError(f"attention native was asked for, but {error}") from error
