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
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from verifier.private_folder import private_folder

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("attention.cpp", "fused.cpp", "products.cpp"))
_HEADERS = tuple(_FOLDER / name for name in ("calls.h", "team.h", "vectors.h"))
_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-pthread")
_NATIVE, _WITHOUT_TILES, _CAREFUL = "-march=native", "-mno-amx-bf16", "-march=x86-64-v3"
"""What the processor says that it has; that without AMX, which some hosts list and deny; what nearly all have."""
_LIMIT_S = 120.0

_Pointer = ctypes.c_void_p


class NoLibrary(Exception):
    """Native code cannot be had here; the message is one line."""


class StepStruct(ctypes.Structure):
    """`Step` of calls.h."""

    _fields_ = (
        *((name, _Pointer) for name in ("starts", "rows", "prefix_lens", "depths", "ancestors")),
        *((name, _Pointer) for name in ("write_slots", "page_table")),
        *(
            (name, ctypes.c_int32)
            for name in ("num_segments", "num_trees", "page_size", "pages_per_row", "num_threads")
        ),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of calls.h."""

    _fields_ = (
        ("k", _Pointer),
        ("v", _Pointer),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "k_dim", "v_dim", "window")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class InputsStruct(ctypes.Structure):
    """`Inputs` of calls.h."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "value")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("query", "key", "value") for axis in ("head", "place")),
        ("sinks", _Pointer),
        ("out", _Pointer),
    )


class SizesStruct(ctypes.Structure):
    """`Sizes` of calls.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "outputs", "width", "stride"))


class HeadsStruct(ctypes.Structure):
    """`Heads` of calls.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("places", "heads", "width", "head_stride", "place_stride"))


class MatrixStruct(ctypes.Structure):
    """`Matrix` of calls.h."""

    _fields_ = (("weight", _Pointer), ("bias", _Pointer), ("outputs", ctypes.c_int64), ("width", ctypes.c_int64))


class NormStruct(ctypes.Structure):
    """`Norm` of calls.h."""

    _fields_ = (("weight", _Pointer), ("eps", ctypes.c_float), ("is_early", ctypes.c_int32))


class DecoderStruct(ctypes.Structure):
    """`Decoder` of calls.h."""

    _fields_ = (
        *((name, MatrixStruct) for name in ("heads", "out", "gates", "down")),
        *((name, NormStruct) for name in ("first", "second", "query", "key")),
        ("attention", _Pointer),
        ("activation", ctypes.c_int32),
    )


@cache
def load_library() -> ctypes.CDLL:
    """The compiled library. Raises: NoLibrary."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoLibrary("compiling native code needs g++")
    try:
        sources = [source.read_bytes() for source in (*_SOURCES, *_HEADERS)]
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_LIMIT_S, check=True).stdout
        parts = (*sources, version, _processor(), *(flag.encode() for flag in _FLAGS))
        path = private_folder() / f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise NoLibrary(f"compiling native code failed: {_reason(error)}") from error


def _compile(compiler: str, path: Path) -> None:
    """Write the library, whole or not at all: other processes may want the same one. The sources side by side."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in _SOURCES]
        built = Path(scratch) / path.name
        for flags in ((*_FLAGS, _NATIVE), (*_FLAGS, _NATIVE, _WITHOUT_TILES), (*_FLAGS, _CAREFUL)):
            with ThreadPoolExecutor() as threads:
                pairs = zip(_SOURCES, objects, strict=True)
                list(threads.map(_run, [[compiler, *flags, "-c", str(one), "-o", str(out)] for one, out in pairs]))
            _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(built)])
            if _works(built):
                built.replace(path)
                return
        raise NoLibrary("native code was compiled, but does not run on this processor")


def _works(library: Path) -> bool:
    """Whether the code runs, tried in a process of its own: some processors list instructions on which they trap."""
    run = "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); sys.exit(library.try_products() != 1)"
    return (
        subprocess.run([sys.executable, "-S", "-c", run, str(library)], timeout=_LIMIT_S, check=False).returncode == 0
    )


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, timeout=_LIMIT_S, check=True)


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
