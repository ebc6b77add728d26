"""Compile every kernel for Hopper; needs Triton and its assembler, no GPU. Run: python -m tests.compile_kernels [--few]

Prints registers, bytes spilled and shared memory of each; fails if one does not compile or wants more than an SM has.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verifier.cuda.kernels.attend import attend_kernel
from verifier.cuda.kernels.combine import combine_kernel
from verifier.cuda.kernels.draw import draw_kernel, finish_kernel
from verifier.cuda.kernels.move import move_kernel
from verifier.cuda.kernels.rank import count_kernel, rank_kernel
from verifier.cuda.kernels.scatter import scatter_kernel
from verifier.cuda.kernels.survey import survey_kernel
from verifier.cuda.kernels.walk import walk_kernel
from verifier.cuda.launch import Tuning, make_launch
from verifier.probe import LayerGeometry

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
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
SHAPES = {
    "llama 8b, one node": (LayerGeometry("layer", 32, 8, 128, 128, 0.088, None, None, False), (1, 1, 1)),
    "llama 8b, 64 nodes": (LayerGeometry("layer", 32, 8, 128, 128, 0.088, None, None, False), (64, 64, 1)),
    "qwen 0.5b, 64 nodes": (LayerGeometry("layer", 14, 2, 64, 64, 0.125, None, None, False), (64, 64, 1)),
    "gemma 2, 64 nodes": (LayerGeometry("layer", 16, 8, 256, 256, 0.0625, 4096, 50.0, False), (64, 64, 1)),
    "gpt-oss, 8 nodes": (LayerGeometry("layer", 64, 8, 64, 64, 0.125, 128, None, True), (8, 8, 1)),
    "deepseek, 8 rows": (LayerGeometry("layer", 16, 16, 192, 128, 0.07, None, None, False), (64, 64, 8)),
}
FEW = ("llama 8b, 64 nodes", "gpt-oss, 8 nodes")


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str], **options: int) -> str:
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
    compiled = triton.compile(source, target=HOPPER, options={"enable_fp_fusion": True, **options})
    shared = int(compiled.metadata.shared)
    assert shared <= SHARED_BYTES, f"{kernel.__name__}: {shared} bytes of shared memory"
    registers, spilled = resource_usage(compiled.asm["cubin"])
    return f"{kernel.__name__:16} {registers:4} registers {spilled:5} bytes spilled {shared:7} bytes shared"


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


def attention(geometry: LayerGeometry, size: tuple[int, int, int], dtype: torch.dtype) -> list[str]:
    """Both attention kernels, as verifier.cuda.attention would launch them."""
    launch = make_launch(geometry, size, dtype.itemsize, Tuning())
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
        "segments_pad": 64,
        **{name: getattr(launch, name) for name in ("k_pad", "v_pad", "block_q", "block_m", "block_n", "block_r")},
        **{name: getattr(launch, name) for name in ("num_splits", "num_programs", "min_keys")},
    }
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    types = dict.fromkeys(["query", "key_pool", "value_pool", "out", "sinks"], kind)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return [
        compile_kernel(attend_kernel, constants, types, **options),
        compile_kernel(combine_kernel, constants, types, num_warps=4),
    ]


def sampling(kind: str) -> list[str]:
    """The kernels of verifier.cuda.kernels.sample, over logits of type `kind`."""
    constants = {"block": 4096, "blocks_pad": 64, "num_rounds": 3, "num_passes": 8 if kind == "fp64" else 4}
    types = {"logits": kind, "tops": "fp64"}
    counting = {**types, "counts": "i32"}
    return [
        compile_kernel(survey_kernel, constants, types, num_warps=8),
        compile_kernel(count_kernel, {**constants, "level": 3}, counting, num_warps=8),
        compile_kernel(rank_kernel, constants, counting),
        compile_kernel(draw_kernel, {**constants, "turn": 0}, types, num_warps=8),
        compile_kernel(draw_kernel, {**constants, "turn": 2}, types, num_warps=8),
        compile_kernel(finish_kernel, constants, types, num_warps=8),
    ]


def main(is_short: bool) -> None:
    """Compile all, or one variant of each, and print a table."""
    for name, (geometry, size) in SHAPES.items():
        if not is_short or name in FEW:
            for line in attention(geometry, size, torch.bfloat16):
                sys.stdout.write(f"{line}  {name}\n")
    llama, size = SHAPES["llama 8b, one node"]
    for dtype in () if is_short else (torch.float16, torch.float32):
        for line in attention(llama, size, dtype):
            sys.stdout.write(f"{line}  {dtype}\n")
    for kind in ("fp32",) if is_short else ("fp32", "fp64"):
        for line in sampling(kind):
            sys.stdout.write(f"{line}  logits {kind}\n")
    heads = {"kv_heads": 8, "k_dim": 128, "v_dim": 128, "k_pad": 128, "v_pad": 128, "lines": 16}
    lines = [
        compile_kernel(scatter_kernel, heads, {}),
        compile_kernel(move_kernel, {"width": 1024, "block": 1024}, {}, num_stages=1),
        compile_kernel(walk_kernel, {"most_nodes": 64}, {"starts": "i64"}, num_warps=1),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main("--few" in sys.argv[1:])
