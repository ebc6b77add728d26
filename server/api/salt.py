"""`cache_salt`: a prefix cache, and a drafters' memory, of its own within a tenant."""

from __future__ import annotations

import hashlib


def salted(tenant: str, salt: str | None) -> str:
    """The tenant under which a request runs: nothing is shared with requests of another key or of another salt."""
    if not salt:
        return tenant
    return hashlib.sha256(f"{tenant}/{salt}".encode()).hexdigest()[:16]
