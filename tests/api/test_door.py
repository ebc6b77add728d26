"""Keys, request ids, probes, and errors of the app itself."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.errors import EngineUnavailable, Overloaded
from server.metrics import ANSWER_ROUTES
from tests.api.fake_engine import FakeEngine, ready
from tests.api.house import House, chat_body, events, make_house, say

HOME = "/v1/models"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path)


@pytest.fixture
def locked(tmp_path: Path) -> House:
    return make_house(tmp_path, api_key=("alpha", "beta"))


@pytest.mark.parametrize("header", ["Bearer alpha", "bearer beta", "BEARER  alpha"])
def test_good_keys(locked: House, header: str) -> None:
    assert locked.get(HOME, headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer ", "Bearer Alpha", "Basic alpha", "alpha", "Bearer alph", "Bearer ü"]
)
@pytest.mark.parametrize("path", [HOME, "/openapi.json", "/nowhere", "/v1/models/m"])
def test_bad_keys(locked: House, header: str | None, path: str) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    response = locked.get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("raw", [b"\xff", b"Bearer \xe9", b"Bearer \xa0", "Bearer голос".encode(), b"\xe9 alpha"])
def test_a_key_of_any_bytes_is_refused_not_a_failure(locked: House, raw: bytes) -> None:
    response = locked.get(HOME, headers={"Authorization": raw})
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("key", ["ключ", "voilà", "…", "\udcff\udca0"])
def test_a_key_is_compared_by_its_bytes(tmp_path: Path, key: str) -> None:
    """The last byte of some characters is a blank in Latin-1; what is no text came from the environment."""
    house = make_house(tmp_path, api_key=(key,))
    sent = b"Bearer " + key.encode("utf-8", "surrogateescape")
    assert house.get(HOME, headers={"Authorization": sent}).status_code == 200
    assert house.get(HOME, headers={"Authorization": sent[:-1]}).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_may_ask_for_the_head_alone(house: House, path: str) -> None:
    def head() -> int:
        async def send() -> int:
            async with house.client() as client:
                return (await client.head(path)).status_code

        return asyncio.run(send())

    assert head() == 200
    house.engine.is_dead = True
    assert head() == 503


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_open_routes(locked: House, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_a_key_is_a_tenant(locked: House) -> None:
    for key in ("alpha", "beta", "alpha"):
        body = {"model": "m", "prompt": "x"}
        assert locked.post("/v1/completions", body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    tenants = [submit.tenant for submit in locked.engine.submits]
    assert tenants[0] == tenants[2] != tenants[1]
    assert all("alpha" not in tenant and len(tenant) == 16 for tenant in tenants)


def test_without_keys_all_are_one_tenant(house: House) -> None:
    house.complete()
    assert house.engine.submits[0].tenant == "public"


def test_request_id_is_echoed(house: House) -> None:
    headers = {"X-Request-Id": "abc-1.2:3"}
    assert house.get(HOME, headers=headers).headers["x-request-id"] == "abc-1.2:3"
    assert house.get("/nowhere", headers=headers).headers["x-request-id"] == "abc-1.2:3"
    stream = house.post("/v1/chat/completions", chat_body(stream=True), headers=headers)
    assert stream.headers["x-request-id"] == "abc-1.2:3"
    assert house.post("/v1/completions", b"{", headers=headers).headers["x-request-id"] == "abc-1.2:3"


@pytest.mark.parametrize("bad", [b"a b", b"x" * 129, b"\xff\xfe", b"a\tb", b"<script>", b""])
def test_strange_request_id_is_replaced(house: House, bad: bytes) -> None:
    given = house.get(HOME, headers={"X-Request-Id": bad}).headers["x-request-id"]
    assert len(given) == 32
    assert given.isalnum()


def test_no_such_route(house: House) -> None:
    error = house.get("/v2/x").json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")
    response = house.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_models(house: House) -> None:
    body = house.get(HOME).json()
    assert [card["id"] for card in body["data"]] == ["m", "org/name"]
    assert body["data"][0]["max_model_len"] == 1024
    assert house.get("/v1/models/org/name").json()["id"] == "org/name"
    missing = house.get("/v1/models/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_models_wait_for_what_the_worker_says(house: House) -> None:
    """Clients plan by `max_model_len`: a card without it would be taken for the truth."""
    house.engine.info, house.engine.is_ready = None, False
    for path in (HOME, "/v1/models/m"):
        loading = house.get(path)
        assert loading.status_code == 503
        assert loading.headers["retry-after"] == "2"
        assert "loading" in loading.json()["error"]["message"]
    house.engine.info = ready()
    assert house.get(HOME).status_code == 200, "a worker that is being replaced serves the same model"


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/chat/completions", 405), ("/v1/models", 405), ("/health", 405), ("/nowhere", 404)]
)
def test_a_preflight_needs_no_key_and_opens_nothing(locked: House, path: str, status: int) -> None:
    headers = {
        "Origin": "http://page.test",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }

    async def ask() -> httpx.Response:
        async with locked.client() as client:
            return await client.options(path, headers=headers)

    response = asyncio.run(ask())
    assert response.status_code == status
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert locked.post(path, {}, headers={"Origin": "http://page.test"}).status_code in (401, 405)


def test_probes_follow_the_engine(house: House) -> None:
    assert house.get("/ready").json() == {"status": "ready"}
    house.engine.is_ready = False
    assert house.get("/health").status_code == 200
    loading = house.get("/ready")
    assert loading.status_code == 503
    assert "loading" in loading.json()["error"]["message"]
    assert house.complete().status_code == 503
    house.engine.is_draining = True
    assert "draining" in house.get("/ready").json()["error"]["message"]
    house.engine.is_dead = True
    assert house.get("/health").status_code == 503
    assert house.get("/ready").status_code == 503
    assert house.engine.submits == []


@pytest.mark.parametrize("stream", [False, True])
def test_overload_says_when_to_come_back(house: House, stream: bool) -> None:
    house.engine.refusal = Overloaded("full", retry_after_s=1.5)
    response = house.chat(stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.headers["retry-after-ms"] == "1500"
    assert response.json()["error"] == {
        "message": "full",
        "type": "rate_limit_error",
        "param": None,
        "code": "server_overloaded",
    }
    house.engine.refusal = EngineUnavailable("later", retry_after_s=0.2)
    response = house.chat(stream=stream)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_our_own_fault_is_a_500_in_shape(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(name: str) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(house.scribe, "chat", break_it)
    response = house.chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in response.text


def test_version_and_schema(house: House) -> None:
    assert house.get("/version").json()["version"]
    document = house.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert schema["additionalProperties"] == {"enum": [None, "", [], {}]}
    assert {"messages", "temperature", "speculative"} <= schema["properties"].keys()
    assert "CompletionRequest" in document["components"]["schemas"]
    assert house.get("/openapi.json").json() == document


def test_refusals_are_no_answers(house: House) -> None:
    house.engine.refusal = Overloaded("full", retry_after_s=1)
    house.complete()
    text = house.get("/metrics").text
    assert 'foretoken_requests_total{finish_reason="error"} 0.0' in text
    assert "foretoken_request_duration_seconds_count 0.0" in text


def test_the_api_process_has_no_torch() -> None:
    code = "import sys, server.app; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_routes_that_answer_are_counted_from_the_start(house: House) -> None:
    paths = house.get("/openapi.json").json()["paths"]
    only_tokens = {"/tokenize", "/detokenize", "/v1/chat/completions/render"}
    assert {path for path, methods in paths.items() if "post" in methods} - only_tokens == set(ANSWER_ROUTES)


def test_metrics_count_answers(tmp_path: Path) -> None:
    house = make_house(tmp_path, FakeEngine(say("abc")))
    house.engine.num_restarts = 2
    house.complete()
    events(house.chat(stream=True))
    house.complete(max_tokens=2)
    house.get("/nowhere")
    text = house.get("/metrics").text
    assert 'foretoken_requests_total{finish_reason="stop"} 2.0' in text
    assert 'foretoken_requests_total{finish_reason="length"} 1.0' in text
    assert "foretoken_generated_tokens_total 10.0" in text
    assert "foretoken_worker_restarts_total 2.0" in text
    assert 'foretoken_http_requests_total{route="/v1/completions",status="200"} 2.0' in text
    assert 'foretoken_http_requests_total{route="none",status="404"} 1.0' in text
    assert "foretoken_time_to_first_token_seconds_count 3.0" in text
    assert "foretoken_worker_restarts_total 2.0" in house.get("/metrics").text


def test_choices_are_counted_by_prompt(house: House) -> None:
    house.engine.script = say("abcd")
    house.complete(prompt=["Hi", "Ho"], n=3, max_tokens=2)
    house.engine.refusal = Overloaded("full", retry_after_s=1)
    house.complete(n=5)
    text = house.get("/metrics").text
    assert "foretoken_request_n_sum 6.0" in text
    assert "foretoken_request_n_count 2.0" in text
    assert "foretoken_request_longest_generated_tokens_sum 4.0" in text
