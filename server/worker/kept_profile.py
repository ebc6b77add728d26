"""What steps cost, kept from one start to the next: a worker that replaces a dead one is busy before it can measure."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from server.worker.step_cost import Profile
from verifier.private_folder import cache_folder

_LIMIT_BYTES = 2**20


class KeptProfile:
    """A file named by all that the costs depend on. It is measured anew as soon as nobody waits."""

    def __init__(self, name: str) -> None:
        """`name` tells model, machine and settings apart."""
        self._name = f"costs-{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"

    def load(self) -> Profile | None:
        """What was saved; None if there is nothing that can be read."""
        try:
            path = cache_folder() / self._name
            if path.stat().st_size > _LIMIT_BYTES:
                return None
            found = msgspec.json.decode(path.read_bytes(), type=Profile)
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        is_sound = any(step.num_rows == 1 for step in found.steps) and all(
            step.seconds > 0 and step.num_positions > 0 for step in found.steps
        )
        return found if is_sound else None

    def save(self, profile: Profile) -> None:
        """Write it, whole or not at all. Where that cannot be, the next start knows nothing."""
        with contextlib.suppress(OSError):
            folder = cache_folder()
            handle, scratch = tempfile.mkstemp(dir=folder, prefix="costs-", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(msgspec.json.encode(profile))
                Path(scratch).replace(folder / self._name)
            except OSError:
                Path(scratch).unlink(missing_ok=True)
