"""Ways to write a key into deploy/.env, with the key that each of them means: to compose, and so to smoke.sh."""

from __future__ import annotations

ENV_LINES = {
    "FORETOKEN_API_KEY=abc # team a": "abc",
    "FORETOKEN_API_KEY='abc' # team a": "abc",
    'FORETOKEN_API_KEY="a # b" # team a': "a # b",
    "FORETOKEN_API_KEY=a#b": "a#b",
    "FORETOKEN_API_KEY = abc  ": "abc",
    "export FORETOKEN_API_KEY=abc": "abc",
}
