"""A CUDA device that is not there: tensors that say they lie on it, and a Triton driver that compiles and counts.

Whoever launches a kernel here goes the whole way of the launch side, as on a device: Triton binds the arguments,
specialises, compiles and loads the binary. Only then nothing runs. Arguments are checked as a driver would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.bench.compile_kernels import Device, resource_usage

_MAX_GRID = (2**31 - 1, 65535, 65535)
_RESERVED_BYTES = 1024
"""Of a multiprocessor's shared memory, which a program cannot have."""
_EMPTY = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
_INTEGERS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64}


@dataclass(frozen=True)
class Launched:
    """One launch, as the device would have got it."""

    name: str
    grid: tuple[int, int, int]
    binary: int
    """Which of the loaded ones."""


class MockTensor(torch.Tensor):
    """A tensor in the host's memory that says it lies on the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


class MockMemory(TorchFunctionMode):
    """What is made on or moved to the device becomes a MockTensor; what mixes it with the host's memory fails.

    It holds zeros where a kernel should have written: the host reads them as results.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cpu:
            return args[0].clone().as_subclass(torch.Tensor)
        if func is not torch.device and any(map(_is_cuda, (*args, *kwargs.values()))):
            args = tuple("cpu" if _is_cuda(argument) else argument for argument in args)
            made = func(*args, **{name: "cpu" if _is_cuda(value) else value for name, value in kwargs.items()})
            made = (made.clone() if func is torch.Tensor.to else made).as_subclass(MockTensor)
            return made.zero_() if func in _EMPTY else made
        arrays = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        is_mixed = len({isinstance(array, MockTensor) for array in arrays}) > 1
        assert not is_mixed or func is torch.Tensor.copy_, f"{func.__name__} of tensors on host and device"
        made = func(*args, **kwargs)
        return made.zero_() if func in _EMPTY else made


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).partition(":")[0] == "cuda"


class MockEvent:
    """Work is done as soon as it is asked for."""

    def record(self, *_: object) -> None:
        """Nothing to remember."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class MockDriver:
    """Stands for Triton's CUDA driver. Owns the binaries that were loaded, and the list of launches."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.launches: list[Launched] = []
        self.binaries: list[tuple[int, int]] = []
        """Registers and bytes of stack of a thread of each."""
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", self.device.capability, 32)

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """There is one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors say they lie."""
        return torch.device("cuda", 0)

    def get_device_properties(self, _: int) -> dict[str, int]:
        """What Triton and the code generator of torch ask for."""
        return {
            "max_shared_mem": self.device.shared_bytes - _RESERVED_BYTES,
            "multiprocessor_count": self.device.num_multiprocessors,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, _: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and most threads."""
        assert shared <= self.device.shared_bytes - _RESERVED_BYTES, f"{name}: {shared} bytes of shared memory"
        registers, spilled = resource_usage(cubin)
        self.binaries.append((registers, spilled))
        return len(self.binaries), len(self.binaries) - 1, registers, spilled, 1024

    def unload_module(self, _: int) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, source: Any, _: Any) -> MockLauncher:
        """What Triton calls to launch a kernel."""
        return MockLauncher(self, source)


class MockLauncher:
    """Launches one kernel: checks what a driver would refuse, and notes it."""

    def __init__(self, owner: MockDriver, source: Any) -> None:
        self._owner = owner
        self._name: str = source.fn.__name__
        self._signature: dict[str, str] = source.signature

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        arguments = rest[4:]  # behind metadata and hooks
        assert len(arguments) == len(self._signature), f"{self._name}: {len(arguments)} arguments"
        for (name, kind), argument in zip(self._signature.items(), arguments, strict=True):
            assert _fits(kind, argument), f"{self._name}: {name} = {argument!r} as {kind}"
        grid = (x, y, z)
        is_sound = all(0 < size <= most for size, most in zip(grid, _MAX_GRID, strict=True))
        assert is_sound, f"{self._name}: a grid of {grid}"
        self._owner.launches.append(Launched(self._name, grid, function))


def _fits(kind: str, argument: Any) -> bool:
    """Whether an argument can be passed as what the kernel was compiled for."""
    if kind == "constexpr":
        return True
    if kind.startswith("*"):  # of the device; one without elements may be null
        return isinstance(argument, MockTensor) and bool(argument.data_ptr() or not argument.numel())
    if kind in _INTEGERS:
        return isinstance(argument, int) and -(2 ** (_INTEGERS[kind] - 1)) <= argument < 2 ** (_INTEGERS[kind] - 1)
    return isinstance(argument, float)


@contextlib.contextmanager
def mock_cuda(device: Device) -> Iterator[MockDriver]:
    """torch.cuda and Triton say that there is one such device, with no memory of its own (see MockMemory)."""
    found = SimpleNamespace(
        name="mock",
        major=device.capability // 10,
        minor=device.capability % 10,
        multi_processor_count=device.num_multiprocessors,
        shared_memory_per_multiprocessor=device.shared_bytes,
        shared_memory_per_block_optin=device.shared_bytes - _RESERVED_BYTES,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
    )
    # What these call is not there in a torch without CUDA, nor on a machine without a driver.
    nothing: dict[str, Any] = {
        "_lazy_init": None,
        "_get_device_properties": found,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "Event": MockEvent(),
    }
    mock = MockDriver(device)
    with contextlib.ExitStack() as stack:
        for name, answer in nothing.items():
            stack.enter_context(patch(f"torch.cuda.{name}", lambda *_, answer=answer: answer, create=True))
        stack.enter_context(patch("torch.version.cuda", "13.0"))
        stack.enter_context(patch("torch._C._cuda_getDevice", lambda: 0, create=True))
        stack.enter_context(patch.object(driver, "_active", mock))
        yield mock
