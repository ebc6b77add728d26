"""What we use of transformers, imported without torch's compiler: that takes as long as all of the rest together.

Transformers marks some functions for the compiler, none of which we call, and imports all of it for that. So a stand-in
that leaves functions as they are takes the compiler's place while transformers is imported; who compiles later imports
the real one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_LEFT_OUT: tuple[str, ...] = ("scipy",)
"""Used by the losses of models that detect objects."""
_PART = f"{_COMPILER}._trace_wrapped_higher_order_op"


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, or what makes one, that leaves a function as it is."""
    return function if callable(function) else lambda decorated: decorated


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _mark


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let torch do without its compiler. Nothing changes where the real one has been imported.

    What runs here for the first time stays visible to a compiler that is imported later: for who compiles nothing.
    """
    if _COMPILER in sys.modules:
        yield
        return
    absent = [name for name in _LEFT_OUT if name not in sys.modules]
    sys.modules.update({name: _StandIn(name) for name in (_COMPILER, _PART)})
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # looks as if it were not installed
    try:
        yield
    finally:
        for name in (_COMPILER, _PART, *absent):
            sys.modules.pop(name, None)


def _import() -> None:
    import transformers.masking_utils
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto  # noqa: F401


try:
    with without_compiler():
        _import()
except ImportError:  # a version that wants more of it
    _import()

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402
from transformers.utils import find_adapter_config_file  # noqa: E402

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "find_adapter_config_file",
    "no_init_weights",
    "transformers",
]
