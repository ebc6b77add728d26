"""The native attention, compiled for this machine and loaded: seconds the first time, nothing later.

The compiled file is named by all that it depends on (source, flags, compiler, processor) and kept in a directory of
this user's own; one that others could write to is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
_LIMIT_S = 120.0

_Pointer = ctypes.c_void_p


class NoLibrary(Exception):
    """The native attention cannot be had here; the message is one line."""


class StepStruct(ctypes.Structure):
    """`Step` of native.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("starts", "rows", "prefix_lens", "depths", "ancestors")),
        *((name, _Pointer) for name in ("write_slots", "page_table")),
        *((name, ctypes.c_int32) for name in ("num_segments", "num_trees", "page_size", "pages_per_row")),
    )


class LayerStruct(ctypes.Structure):
    """`Layer` of native.cpp."""

    _fields_ = (
        ("k", _Pointer),
        ("v", _Pointer),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "k_dim", "v_dim", "window")),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class InputsStruct(ctypes.Structure):
    """`Inputs` of native.cpp."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "value")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("query", "key", "value") for axis in ("head", "place")),
        ("sinks", _Pointer),
        ("out", _Pointer),
    )


@cache
def load_library() -> ctypes.CDLL:
    """The compiled library. Raises: NoLibrary."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoLibrary("compiling the attention needs g++")
    try:
        source = _SOURCE.read_bytes()
        threads = _thread_flags()
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_LIMIT_S, check=True).stdout
        parts = (source, version, _processor(), *(flag.encode() for flag in (*_FLAGS, *threads)))
        path = _folder() / f"attention-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
        if not path.exists():
            _compile([compiler, *_FLAGS], threads, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise NoLibrary(f"compiling the attention failed: {_reason(error)}") from error


def _compile(compiler: list[str], threads: list[str], path: Path) -> None:
    """Write the library, whole or not at all: other processes may want the same one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        command = [*compiler, "-fopenmp" if threads else "-Wno-unknown-pragmas", str(_SOURCE), "-o", str(built)]
        subprocess.run([*command, *threads], capture_output=True, timeout=_LIMIT_S, check=True)
        built.replace(path)


def _thread_flags() -> list[str]:
    """Link against the OpenMP library that torch has loaded: two of them would fight over the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    return sorted(loaded)[:1]


def _processor() -> bytes:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "|".join(
        [platform.machine(), *sorted({line for line in lines if line.startswith(("flags", "Feat"))})]
    ).encode()


def _folder() -> Path:
    """Where compiled files are kept. Raises: NoLibrary if somebody else could have put them there."""
    path = Path(tempfile.gettempdir()) / f"foretoken-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise NoLibrary(f"{path} is not a directory of this user's alone")
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if "error" in line]
        return lines[0] if lines else f"the compiler ended with {error.returncode}"
    return str(error)
