"""Which model a client asks for when nobody named one."""

from __future__ import annotations

import httpx

from server.config import SettingsError


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
