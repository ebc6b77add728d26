"""Compile every kernel that a served model can ask for, for three kinds of GPU. It needs Triton, no GPU.

    python -m tests.bench.compile_kernels [--few]

Prints registers, bytes spilled, shared memory and how many programs fit a multiprocessor. Fails if a kernel does not
compile or wants more than a multiprocessor has. `--few` takes two layers and one kind of GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verifier.cuda.graphs import MAX_POSITIONS, ladder
from verifier.cuda.kernels.attend import attend_kernel
from verifier.cuda.kernels.combine import combine_kernel
from verifier.cuda.kernels.draw import draw_kernel, finish_kernel
from verifier.cuda.kernels.move import move_kernel
from verifier.cuda.kernels.rank import count_kernel, rank_kernel
from verifier.cuda.kernels.scatter import scatter_kernel
from verifier.cuda.kernels.survey import survey_kernel
from verifier.cuda.kernels.walk import walk_kernel
from verifier.cuda.launch import Launch, Tuning, make_launch
from verifier.probe import LayerGeometry


@dataclass(frozen=True)
class Device:
    """What is compiled for."""

    capability: int
    num_multiprocessors: int
    shared_bytes: int
    """Of a multiprocessor."""

    @property
    def tuning(self) -> Tuning:
        return Tuning.of(self.num_multiprocessors, self.shared_bytes)


HOPPER = Device(90, 132, 228 * 1024)
DEVICES = (Device(80, 108, 164 * 1024), HOPPER, Device(100, 148, 228 * 1024))
MAX_ROWS, MOST_POSITIONS = 64, 2048
_REGISTERS = 65536
_PROGRAM_BYTES = 1024
"""Shared memory that each program takes beside its own."""
POINTERS = {
    **dict.fromkeys(["query", "key_pool", "value_pool", "out", "sinks", "key", "value", "pool"], "bf16"),
    **dict.fromkeys(["mixes", "tops", "totals", "logits"], "fp32"),
    **dict.fromkeys(["header", "ancestors", "write_slots", "sources", "targets", "records", "chosen"], "i64"),
    **dict.fromkeys(["node_tokens", "node_parents", "won", "moves", "counts"], "i64"),
    **dict.fromkeys(
        ["starts", "rows", "prefix_lens", "depths", "page_table", "tokens", "top_tokens", "winners"], "i32"
    ),
    **dict.fromkeys(["reals", "thresholds", "masses"], "fp64"),
}
LAYERS = {
    "llama 8b": LayerGeometry("layer", 32, 8, 128, 128, 0.088, None, None, False),
    "qwen 0.5b": LayerGeometry("layer", 14, 2, 64, 64, 0.125, None, None, False),
    "gemma 2": LayerGeometry("layer", 16, 8, 256, 256, 0.0625, 4096, 50.0, False),
    "gpt-oss": LayerGeometry("layer", 64, 8, 64, 64, 0.125, 128, None, True),
    "deepseek": LayerGeometry("layer", 16, 16, 192, 128, 0.07, None, None, False),
}
FEW = ("llama 8b", "gpt-oss")


def compile_kernel(
    device: Device, kernel: Any, constants: dict[str, Any], types: dict[str, str], **options: int
) -> str:
    """Compile `kernel` and tell what it takes; `types` are those of pointers that differ from POINTERS."""
    signature, constant_at, hints = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constant_at[(place,)] = "constexpr", constants[name]
        elif name in POINTERS:
            signature[name] = "*" + types.get(name, POINTERS[name])
            hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.endswith("stride"):
                hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constant_at, hints)
    target = GPUTarget("cuda", device.capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True, **options})
    shared = int(compiled.metadata.shared) + _PROGRAM_BYTES
    assert shared <= device.shared_bytes, f"{kernel.__name__}: {shared} bytes of shared memory"
    registers, spilled = resource_usage(compiled.asm["cubin"])
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * compiled.metadata.num_warps)
    at_once = min(by_registers, device.shared_bytes // shared)
    taken = f"{registers:4} registers {spilled:5} bytes spilled {shared:7} bytes shared {at_once:3} at once"
    return f"sm_{device.capability:<4}{kernel.__name__:16}{taken}"


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def launches(geometry: LayerGeometry, dtype: torch.dtype, tuning: Tuning) -> list[Launch]:
    """One launch for each kernel that steps of any size need: those that are recorded, and those that are not."""
    sizes = [(bucket.num_positions, *bucket.size_class) for bucket in ladder(MAX_ROWS, MAX_POSITIONS)]
    rows = [1 << power for power in range(MAX_ROWS.bit_length())]
    most = [1 << power for power in range(MOST_POSITIONS.bit_length())]
    sizes += [(positions, positions, segments) for positions in most for segments in rows if segments <= positions]
    found: dict[tuple[int, ...], Launch] = {}
    for size in sizes:
        launch = make_launch(geometry, size, dtype.itemsize, tuning)
        found.setdefault((launch.block_q, launch.block_m, launch.block_n, launch.num_warps), launch)
    return list(found.values())


def attention(device: Device, geometry: LayerGeometry, dtype: torch.dtype) -> Iterator[str]:
    """Both attention kernels, as verifier.cuda.attention would launch them."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    types = dict.fromkeys(["query", "key_pool", "value_pool", "out", "sinks"], kind)
    for launch in launches(geometry, dtype, device.tuning):
        constants = {
            "scaling": geometry.scaling,
            "softcap": geometry.softcap or 0.0,
            "window": geometry.window or 0,
            "has_sinks": geometry.has_sinks,
            "is_emulated": False,
            "kv_heads": geometry.num_kv_heads,
            "fold": geometry.num_heads // geometry.num_kv_heads,
            "k_dim": geometry.k_dim,
            "v_dim": geometry.v_dim,
            "page_size": 16,
            "segments_pad": 2 * MAX_ROWS,
            **{name: getattr(launch, name) for name in ("k_pad", "v_pad", "block_q", "block_m", "block_n", "block_r")},
        }
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        name = f"{launch.block_m} lines"
        yield f"{compile_kernel(device, attend_kernel, constants, types, **options)}  {name}"
        yield f"{compile_kernel(device, combine_kernel, constants, types, num_warps=4)}  {name}"


def sampling(device: Device, kind: str) -> Iterator[str]:
    """The kernels of verifier.cuda.kernels.sample, over logits of type `kind`."""
    constants = {"block": 4096, "blocks_pad": 64, "num_passes": 8 if kind == "fp64" else 4}
    types = {"logits": kind, "tops": "fp64"}
    counting = {**types, "counts": "i32"}
    yield compile_kernel(device, survey_kernel, constants, types, num_warps=8)
    yield compile_kernel(device, count_kernel, {**constants, "level": 3}, counting, num_warps=8)
    yield compile_kernel(device, rank_kernel, constants, counting)
    for turn in range(3):
        yield compile_kernel(device, draw_kernel, {**constants, "turn": turn}, types, num_warps=8)
    for num_rounds in (0, 3):
        yield compile_kernel(device, finish_kernel, {**constants, "num_rounds": num_rounds}, types, num_warps=8)


def all_kernels(device: Device, is_short: bool) -> Iterator[str]:
    """Compile all, or those of a few layers; a line of each."""
    for name, geometry in LAYERS.items():
        if not is_short or name in FEW:
            yield from (f"{line}, {name}" for line in attention(device, geometry, torch.bfloat16))
    for dtype in () if is_short else (torch.float16, torch.float32):
        yield from (f"{line}, {dtype}" for line in attention(device, LAYERS["llama 8b"], dtype))
    for kind in ("fp32",) if is_short else ("fp32", "fp64"):
        yield from (f"{line}  logits {kind}" for line in sampling(device, kind))
    heads = {"kv_heads": 8, "k_dim": 128, "v_dim": 128, "k_pad": 128, "v_pad": 128, "lines": 16}
    yield compile_kernel(device, scatter_kernel, heads, {})
    yield compile_kernel(device, move_kernel, {"width": 1024, "block": 1024}, {}, num_stages=1)
    yield compile_kernel(device, walk_kernel, {"most_nodes": 64}, {"starts": "i64"}, num_warps=1)


def main(is_short: bool) -> None:
    """Compile for every device, or for one, and print a table."""
    for device in (HOPPER,) if is_short else DEVICES:
        for line in all_kernels(device, is_short):
            print(line, flush=True)


if __name__ == "__main__":
    main("--few" in sys.argv[1:])
