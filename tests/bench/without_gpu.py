"""All that can be seen of the GPU's code without a GPU, in one command. It needs Triton and g++.

    python -m tests.bench.without_gpu [--few] [--only kernels launches layers]

Three sections: every kernel compiles and fits the device (`compile_kernels --few`); what launches kernels binds,
specialises and compiles whatever a step asks for, on an H100 that is not there (`mock_launch`, `mock_backend`); torch
compiles the layers of a Llama for it (`mock_layers`). Prints a table, then one line of JSON; the exit status is 1 if a
section fails. Nothing runs: this says nothing about numbers, races, memory, speed, recording, and libraries of CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch

from tests.bench.compile_kernels import HOPPER, all_kernels
from tests.bench.mock_backend import serve
from tests.bench.mock_cuda import MockMemory, mock_cuda
from tests.bench.mock_launch import launch_all

Section = Callable[[bool, dict[str, Any]], Iterator[str]]


def kernels(is_short: bool, told: dict[str, Any]) -> Iterator[str]:
    """Every kernel by itself."""
    told["num_compiled"] = 0
    for line in all_kernels(HOPPER, is_short=True):
        told["num_compiled"] += 1
        yield line


def launches(is_short: bool, told: dict[str, Any]) -> Iterator[str]:
    """Steps of many shapes, up to the launch; then those of a back end as it is."""
    with mock_cuda(HOPPER) as driver, MockMemory(), torch.inference_mode():
        yield from launch_all(driver, is_short)
        if not is_short:
            yield from serve(driver)
        told["num_launches"], told["num_compiled"] = len(driver.launches), len(driver.binaries)
        told["most_registers"], told["most_spilled"] = (max(column) for column in zip(*driver.binaries, strict=True))


def layers(is_short: bool, told: dict[str, Any]) -> Iterator[str]:
    """A model's layers, compiled by torch."""
    from tests.bench.mock_layers import allow_devices, compile_layers

    allow_devices()
    with mock_cuda(HOPPER):
        codes = compile_layers()
    told["kernels_per_layer"] = []
    problems = [] if len(codes) == 2 else [f"{len(codes)} graphs for layers alike, any number of positions and one"]
    for name, code in zip(("any number of positions", "one position"), codes, strict=False):
        attention = "3 of the attention at most"
        counted = f"{code.num_products} products, {code.num_kernels} Triton kernels ({code.num_variants} variants)"
        yield f"{name:28} {counted}, {attention}"
        told["kernels_per_layer"].append(code.num_products + code.num_kernels + 3)
        problems += code.problems
    assert not problems, "; ".join(problems)


SECTIONS: dict[str, Section] = {"kernels": kernels, "launches": launches, "layers": layers}


def run(name: str, is_short: bool) -> dict[str, Any]:
    """One section: prints its lines, returns what is to be told of it."""
    began, told = perf_counter(), dict[str, Any]()
    print(f"== {name}", flush=True)
    try:
        for line in SECTIONS[name](is_short, told):
            print(line, flush=True)
        told["ok"] = True
    except Exception as error:  # whatever compilers raise: the other sections go on
        traceback.print_exc()
        told |= {"ok": False, "error": str(error).strip().partition("\n")[0] or type(error).__name__}
    return {**told, "seconds": round(perf_counter() - began, 1)}


def main() -> int:
    """Run the sections; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true", help="launches of two steps only")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="these sections")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("with TRITON_INTERPRET=1 nothing is compiled")
    told = {name: run(name, options.few) for name in options.only}
    is_right = all(section["ok"] for section in told.values())
    print(json.dumps({"capability": HOPPER.capability, "torch": torch.__version__, "ok": is_right, **told}))
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
