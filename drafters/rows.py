"""What is known of each row: one record, which every source and the tree search read.

Records are structured NumPy arrays. Compiled code reads their fields by name, and the array crosses into it as one
argument, where twenty plain arrays would be twenty.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drafters.compiled import Index, compiled

RECENT = 512
"""Last tokens of a row that are at hand. The n-gram looks back at four, a head at its window (64 by default)."""
MAX_STOPS = 64
"""Stop tokens that are looked at. Drafting behind one more costs time, never correctness."""
MAX_FRAMES = 32
"""Frames of a head that are looked at."""
PROMPT_WINDOW = 16_384
"""Last tokens of a prompt that are looked at: the n-gram cache of a request holds no more."""

ROW = np.dtype(
    [
        ("recent", np.int64, (RECENT,)),  # the token at position p is recent[p % RECENT]
        ("length", np.int64),  # tokens of prompt and answer so far
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("mask", np.int64),  # sources that draft for the row
        ("tenant_cache", np.int64),  # index of the tenant's n-gram cache, -1 for none
        ("is_trial", np.bool_),  # a trial request's row (drafters.base.NOBODY): nothing of it may stay
        ("stops", np.int64, (MAX_STOPS,)),  # tokens that end the answer
        ("num_stops", np.int64),
        ("factors", np.float64, (MAX_FRAMES, 2)),  # power and reach of the head's estimates: see drafters.coupling
    ]
)


@compiled
def token_back(row: Any, back: Index) -> Index:
    """The token `back` places before the last one, -1 before the start of the text."""
    return row.recent[(row.length - 1 - back) % RECENT] if back < row.length else np.int64(-1)


@compiled
def is_stop(row: Any, token: Index) -> bool:
    """Whether the token ends the row's answer."""
    for index in range(row.num_stops):  # noqa: SIM110 (compiled code has no generators)
        if row.stops[index] == token:
            return True
    return False
