"""What a client of ours asks a server before it begins: which model it serves, and whether it drafts yet."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from server.config import SettingsError

_WAKING_S, _POLL_S = 300.0, 0.5
"""How long a server that compiles beside serving is waited for, and how often it is asked."""


def first_model(url: str, api_key: str) -> str:
    """The name of the first model that a server lists. Raises: SettingsError in one line, with what may be wrong."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(url.rstrip("/") + "/models", headers=headers, timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise SettingsError(f"--url {url}: {error}") from error
    if answer.status_code in (401, 403):
        raise SettingsError(f"--api-key: the server at {url} {'refuses this key' if api_key else 'wants one'}")
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        hint = "" if url.rstrip("/").endswith("/v1") else "; addresses of this kind end in /v1"
        raise SettingsError(f"--url {url}: no model list there (status {answer.status_code}){hint}") from error


def wait_until_it_drafts(url: str, tell: Callable[[str], None], limit_s: float = _WAKING_S) -> None:
    """Wait for a server of ours that has just begun: what it did before it drafts would be measured.

    Any other server has no such state, and is not waited for.
    """
    root, end = url.rstrip("/").removesuffix("/v1"), time.monotonic() + limit_s
    is_told = False
    while time.monotonic() < end:
        try:
            found = httpx.get(f"{root}/health", timeout=30).json()
        except (httpx.HTTPError, ValueError):
            return
        if not isinstance(found, dict) or found.get("drafting") is not False:
            return
        if not is_told:
            tell("the server still compiles beside serving: waiting until it drafts")
            is_told = True
        time.sleep(_POLL_S)
