"""How the hot code of this package is compiled (verifier.jit).

Reference counts are left out: the arrays are held by the drafter for the whole of a call, and counting every array
that is taken out of a tuple cost more than the search itself. The price: compiled functions cannot allocate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from verifier.jit import jit

F = TypeVar("F", bound=Callable[..., object])

Index = Any
"""A whole number of compiled code: an int outside, a machine integer inside."""

Records = Any
"""A structured array. Compiled code reads the fields of a record by name, which NumPy's types cannot tell."""

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
_OPTIONS["no_cfunc_wrapper"] = True  # else a door for C, which nobody uses, is compiled for each of the functions


def compiled(function: F) -> F:
    """A compiled function that allocates nothing."""
    return cast(F, jit(**_OPTIONS)(function))


def inlined(function: F) -> F:
    """The same, always put into its caller."""
    return cast(F, jit(**_OPTIONS, inline="always")(function))
