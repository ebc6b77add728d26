"""What the tenants' caches hold, kept in a file across restarts.

Layout (little endian): magic, version, CRC-32 of all that follows, length of a JSON header, the header, then for each
tenant the numbers of its used slots (uint32) and the slots themselves (drafters.ngram.cache.SLOT). Tenants are named by
the SHA-256 of their name, so that the file holds no key.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from drafters.head.files import FileError, write_whole
from drafters.ngram.cache import SLOT, Caches

MAGIC = b"FTKSTA\0\0"
VERSION = 1


class StateError(Exception):
    """A state file that cannot be read, written or used here; the message is one line for the operator."""


def tenant_digest(tenant: str) -> str:
    """The name under which a tenant's cache is kept: SHA-256, hexadecimal."""
    return hashlib.sha256(tenant.encode("utf-8", errors="surrogatepass")).hexdigest()


def check_place(path: Path) -> None:
    """Find out whether a state can be kept at `path`, while something can still be done about it. Raises: StateError.

    Makes the folder, as `save_state` would, and leaves no file behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=f".{path.name}-", dir=path.parent):
            pass
    except OSError as error:
        reason = "its folder is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise StateError(f"{path}: cannot keep the tri-gram state: {reason}") from error


def save_state(path: Path, caches: Caches, tenants: dict[str, int], fingerprint: str) -> None:
    """Write the caches of `tenants` (digest to cache, least recently used first) in one move.

    The file is readable by its owner only: it holds fragments of traffic. Raises: StateError; the old file then stays.
    """
    pieces: list[bytes] = []
    sizes: list[int] = []
    for cache in tenants.values():
        slots = caches[cache]
        used = np.flatnonzero(slots["key"]).astype(np.uint32)
        sizes.append(int(used.size))
        pieces += [used.tobytes(), slots[used].tobytes()]
    header = {"fingerprint": fingerprint, "slots": caches.shape[1], "tenants": list(tenants), "sizes": sizes}
    text = json.dumps(header).encode()
    body = b"".join([struct.pack("<I", len(text)), text, *pieces])
    try:
        write_whole(path, MAGIC + struct.pack("<II", VERSION, zlib.crc32(body)) + body, 0o600)
    except FileError as error:
        raise StateError(f"cannot keep the tri-gram state: {error}") from error


def load_state(path: Path, caches: Caches, fingerprint: str) -> tuple[dict[str, int], int]:
    """Fill empty `caches` from a file.

    When it holds more tenants than there are caches, the most recently used ones are taken. Returns: cache by tenant
    digest, and the last time stamp. Raises: StateError.
    """
    header, body = _read(path)
    if header["fingerprint"] != fingerprint:
        raise StateError(
            f"{path}: this tri-gram state was learned with another tokenizer "
            f"({header['fingerprint'][:12]} instead of {fingerprint[:12]})"
        )
    num_caches, num_slots = caches.shape
    if header["slots"] != num_slots:
        raise StateError(f"{path}: this tri-gram state has caches of {header['slots']} contexts, not {num_slots}")
    names: list[str] = header["tenants"]
    tenants: dict[str, int] = {}
    stamp = offset = 0
    for index, (name, size) in enumerate(zip(names, header["sizes"], strict=True)):
        used = np.frombuffer(body, np.uint32, count=size, offset=offset)
        slots = np.frombuffer(body, SLOT, count=size, offset=offset + 4 * size)
        offset += size * (4 + SLOT.itemsize)
        if index >= len(names) - num_caches:
            cache = tenants[name] = len(tenants)
            caches[cache, used] = slots
            stamp = max(stamp, int(slots["stamp"].max(initial=0)))
    return tenants, stamp


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tenants' bytes behind it. What passes the checksum is what `save_state` wrote."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path}: cannot read the tri-gram state: {error.strerror}") from error
    start = len(MAGIC) + 8
    if len(content) < start + 4 or content[: len(MAGIC)] != MAGIC:
        raise StateError(f"{path}: not a tri-gram state")
    version, checksum = struct.unpack_from("<II", content, len(MAGIC))
    if version != VERSION:
        raise StateError(f"{path}: tri-gram state of version {version}, this program reads version {VERSION}")
    if zlib.crc32(content[start:]) != checksum:
        raise StateError(f"{path}: the tri-gram state is broken or was cut short")
    (length,) = struct.unpack_from("<I", content, start)
    return json.loads(content[start + 4 : start + 4 + length]), content[start + 4 + length :]
