"""The launch side of the kernels, and the code of compiled layers, as far as they show without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import require_kernels

ROOT = Path(__file__).resolve().parent.parent.parent
GENERATED = """
class Runner:
    def call(self, args):
        arg0_1, arg1_1, arg2_1, arg3_1 = args
        extern_kernels.mm(arg0_1, arg0_1, out=buf1)
        triton_poi_fused_0.run(buf1, arg3_1.item(), 4096, stream=raw_stream0)
        assert_size_stride(arg1_1, (4096, 8, 128), (1024, 128, 1), 'input')
        {before}
        buf7 = torch.ops.foretoken.attend_paged_0.default(buf5, buf6, buf4, None, {pool}, arg2_1)
        del arg2_1
runner = Runner(partitions=[])
    arg3_1 = rand_strided((), (), device='{device}', dtype=torch.float64)
"""


@pytest.mark.slow
def test_a_step_launches_its_kernels() -> None:
    """What the interpreter takes, a launch may not: tensors of the device, arguments bound and specialised."""
    require_kernels("cpu")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.without_gpu", "--few", "--only", "launches"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ok"]
    assert told["launches"]["num_launches"] > told["launches"]["num_compiled"] > 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"pool": "buf9"}, "the attention is not given the pool itself: buf7 = torch.ops"),
        ({"pool": "reinterpret_tensor(arg1_1, (1, 2), (2, 1), 0)"}, "the attention is not given the pool itself"),
        ({"before": "buf9.copy_(arg1_1)"}, "the pool is used elsewhere: buf9.copy_(arg1_1)"),
        ({"device": "cuda:0"}, "the host waits for arg3_1"),
    ],
)
def test_code_of_a_layer_is_read(change: dict[str, str], problem: str | None) -> None:
    require_kernels("cpu")
    from tests.bench.mock_layers import read_code

    fields = {"pool": "arg1_1", "before": "pass", "device": "cpu"}
    code = read_code(GENERATED.format(**{**fields, **change}), 1)
    assert (code.num_products, code.num_kernels) == (1, 1)
    assert len(code.problems) == (problem is not None)
    assert problem is None or code.problems[0].startswith(problem)
