"""What torch's compiler makes of the layers of a Llama for a GPU, found out without one.

The network's tensors are fake: they have shapes and lie on a CUDA device, but hold nothing. `CompiledLayers` compiles
them as it does when a model is loaded; the code comes out, its kernels are compiled by Triton, and none of it runs.
Whether the results are right can only be seen where they can be computed: see tests/unit/test_layers.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.bench.device_model import make_config
from verifier.attention import LayerKV
from verifier.cuda.layers import CompiledLayers
from verifier.model import KV_ATTRIBUTE, Pass, Target, build_on_meta
from verifier.probe import probe_config

_NUM_LAYERS, _NUM_SLOTS = 2, 4096
_MOST_PRODUCTS, _MOST_KERNELS = 7, 6
"""Of a layer of a Llama: matrix products, and what lies between them."""
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@dataclass(frozen=True)
class LayerCode:
    """What was generated for one layer, for any number of positions or for one."""

    num_products: int
    num_kernels: int
    """Triton kernels between the products."""
    num_variants: int
    """How often Triton compiled them: each in some sizes, of which the device is to choose."""
    problems: tuple[str, ...]


class NoYardstick:
    """Stands for the comparison with a plain pass: there are no numbers."""

    def __init__(self, *_: object) -> None: ...

    def example(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions [1, num_positions]."""
        ids = torch.zeros((1, num_positions), dtype=torch.int64, device="cuda")
        return ids, ids.clone()

    def measure(self, passes: list[tuple[int, Pass]]) -> float:
        """Not off."""
        return 0.0


class Generated:
    """Takes what the compiler generates, and gives a layer that does nothing in its place."""

    def __init__(self) -> None:
        self.codes: list[LayerCode] = []
        self._num_variants = 0

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """While this lasts."""
        make, generated = GraphLowering.compile_to_module, self

        def compile_to_module(graph: GraphLowering) -> type:
            module: Any = make(graph)
            code = read_code(Path(module.__file__).read_text(encoding="utf-8"), generated._num_variants)
            generated.codes.append(code)
            generated._num_variants = 0
            return _Nothing

        def precompile(kernel: Any, *_: object, **__: object) -> None:
            kernel._precompile_worker()
            generated._num_variants += len(kernel.compile_results)

        with (
            patch.object(GraphLowering, "compile_to_module", compile_to_module),
            patch.object(CachingAutotuner, "precompile", precompile),
        ):
            yield


class _Nothing:
    """A compiled module whose layer hands on what it was given."""

    @staticmethod
    def call(arguments: list[Any]) -> list[torch.Tensor]:
        return [next(argument for argument in arguments if isinstance(argument, torch.Tensor)).clone()]


def read_code(text: str, num_variants: int) -> LayerCode:
    """Count what a generated module runs, and look for what it should not do."""
    body = text[text.index("def call(") : text.index("runner = ")]
    lines = [line.strip() for line in body.splitlines()]
    lines = [line for line in lines if not line.startswith("#")]
    products = [line for line in lines if line.startswith("extern_kernels.")]
    kernels = [line for line in lines if ".run(" in line]
    calls = [line for line in lines if "torch.ops.foretoken." in line and "assert" not in line]
    problems = [] if len(calls) == 1 else [f"{len(calls)} calls of the attention"]
    for call in calls:
        pools = re.search(r", (arg\d+_1), (arg\d+_1)\)$", call)
        if pools is None:
            problems.append(f"the attention is not given the pool itself: {call}")
            continue
        pattern = re.compile(rf"\b({pools[1]}|{pools[2]})\b")
        uses = [line for line in lines if pattern.search(line) and not line.startswith(("assert_", "del "))]
        problems += [f"the pool is used elsewhere: {line}" for line in uses if line != call and "= args" not in line]
    for name in re.findall(r"(\w+)\.item\(\)", body):
        if re.search(rf"{name} = rand_strided\(.*device='cpu'", text) is None:
            problems.append(f"the host waits for {name}")
    if len(products) > _MOST_PRODUCTS or len(kernels) > _MOST_KERNELS:
        problems.append(f"{len(products)} products and {len(kernels)} kernels")
    return LayerCode(len(products), len(kernels), num_variants, tuple(problems))


def allow_devices() -> None:
    """Let tensors say that they lie on a CUDA device where torch was built without, which then knows of no such one."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD, encoding="ascii")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
        subprocess.run(["g++", *options, "-o", str(library), str(source), "-lc10"], check=True)
        ctypes.CDLL(str(library))


@contextlib.contextmanager
def compiler_without_device() -> Iterator[None]:
    """Nothing is read from caches, no other process compiles, and no driver is looked for."""
    begin = joint_graph.lazy_init
    with (
        torch._inductor.config.patch(force_disable_caches=True, compile_threads=1),
        # Patterns of graphs are drawn up with real numbers; where those lie is no part of the pattern.
        patch.object(joint_graph, "lazy_init", lambda _=None: begin(torch.device("cpu"))),
        patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None),
        patch("torch._C._cuda_getCurrentRawStream", lambda _: 0, create=True),
        patch("verifier.cuda.layers.Yardstick", NoYardstick),
    ):
        yield


def compile_layers() -> list[LayerCode]:
    """Compile a Llama of two layers. Returns: one entry for any number of positions, one for a single one.

    Raises: CompileError where a layer is not one graph; it needs `mock_cuda`.
    """
    config = make_config("llama-8b", is_tiny=False)
    config.num_hidden_layers = _NUM_LAYERS
    layers = probe_config(config).layers
    network = build_on_meta(config)
    generated = Generated()
    with compiler_without_device(), generated.taken(), FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the addresses of what has no memory
        for module in network.modules():
            for name, weight in module.named_parameters(recurse=False):
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda"))
        for layer in layers:
            k = torch.empty((_NUM_SLOTS, layer.num_kv_heads, layer.k_dim), dtype=torch.bfloat16, device="cuda")
            v = torch.empty((_NUM_SLOTS, layer.num_kv_heads, layer.v_dim), dtype=torch.bfloat16, device="cuda")
            setattr(network.get_submodule(layer.name), KV_ATTRIBUTE, LayerKV(k, v, layer))
        CompiledLayers(Target(network), [layer.name for layer in layers], config.vocab_size)
    return generated.codes
