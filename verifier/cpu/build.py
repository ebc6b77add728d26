"""Our C++ for a CPU, attention and products, compiled for this machine and loaded: seconds once, nothing later.

The compiled file is named by all that it depends on (sources, flags, compiler, processor) and kept in a directory of
this user's own; one that others could write to is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from verifier.private_folder import private_folder

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("attention.cpp", "fused.cpp", "products.cpp"))
_HEADERS = (_FOLDER / "vectors.h",)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
_LIMIT_S = 120.0

_Pointer = ctypes.c_void_p


class NoLibrary(Exception):
    """Native code cannot be had here; the message is one line."""


class StepStruct(ctypes.Structure):
    """`Step` of attention.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("starts", "rows", "prefix_lens", "depths", "ancestors")),
        *((name, _Pointer) for name in ("write_slots", "page_table")),
        *((name, ctypes.c_int32) for name in ("num_segments", "num_trees", "page_size", "pages_per_row")),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of attention.cpp."""

    _fields_ = (
        ("k", _Pointer),
        ("v", _Pointer),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "k_dim", "v_dim", "window")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class InputsStruct(ctypes.Structure):
    """`Inputs` of attention.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "value")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("query", "key", "value") for axis in ("head", "place")),
        ("sinks", _Pointer),
        ("out", _Pointer),
    )


class SizesStruct(ctypes.Structure):
    """`Sizes` of products.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "outputs", "width", "stride"))


class HeadsStruct(ctypes.Structure):
    """`Heads` of fused.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("places", "heads", "width", "head_stride", "place_stride"))


@cache
def load_library() -> ctypes.CDLL:
    """The compiled library. Raises: NoLibrary."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoLibrary("compiling native code needs g++")
    try:
        sources = [source.read_bytes() for source in (*_SOURCES, *_HEADERS)]
        threads = _thread_flags()
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_LIMIT_S, check=True).stdout
        parts = (*sources, version, _processor(), *(flag.encode() for flag in (*_FLAGS, *threads)))
        path = private_folder() / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
        if not path.exists():
            _compile([compiler, *_FLAGS], threads, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise NoLibrary(f"compiling native code failed: {_reason(error)}") from error


def _compile(compiler: list[str], threads: list[str], path: Path) -> None:
    """Write the library, whole or not at all: other processes may want the same one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        command = [*compiler, "-fopenmp", *map(str, _SOURCES), "-o", str(built)]
        subprocess.run([*command, *threads], capture_output=True, timeout=_LIMIT_S, check=True)
        built.replace(path)


def _thread_flags() -> list[str]:
    """Link against the OpenMP library that torch has loaded: two of them would fight over the cores.

    Raises: NoLibrary if torch has another one, as one core would be slower than torch.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    loaded = sorted({line.split(maxsplit=5)[5] for line in lines if "libgomp" in line and "(deleted)" not in line})
    if not loaded:
        raise NoLibrary("torch computes with another OpenMP library than that of g++")
    own = Path(torch.__file__).parent.parent  # torch's libraries lie in its folder, or beside it
    return [next((path for path in loaded if path.startswith(str(own))), loaded[0])]


def _processor() -> bytes:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "|".join(
        [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Feat"))})]
    ).encode()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if "error" in line]
        return lines[0] if lines else f"the compiler ended with {error.returncode}"
    return str(error)
