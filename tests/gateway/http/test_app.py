"""Which path is served how, which clients are served, and what becomes of every error."""

import asyncio
import json
import logging

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from yarl import URL

from tests.gateway.fakes import running, until
from throttllem.config import LimitOptions, ServerOptions
from throttllem.core.types import Slo
from throttllem.openai_api.errors import ApiError

COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "x"}


def within(check, **options):
    """The result of `check(gateway)`."""

    async def main():
        async with running(**options) as there:
            return await check(there)

    return asyncio.run(main())


def error_of(body):
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_models_are_listed_and_found():
    async def check(there):
        _, _, listed = await there.get("/v1/models")
        _, _, one = await there.get("/v1/models/org/other")
        assert (await there.get("/v1/models/org%2Fother"))[2] == one
        assert [(await there.get(path))[0] for path in ("/v1%2Fmodels", "/v1/models/org%2F..%2Fother")] == [404, 404]
        status, _, none = await there.get("/v1/models/none")
        return json.loads(listed), json.loads(one), status, error_of(none)

    listed, one, status, none = within(check)
    assert [entry["id"] for entry in listed["data"]] == ["tiny", "org/other"]
    assert one == listed["data"][1] and one["owned_by"] == "throttllem"
    assert (one["max_model_len"], one["odd"]) == (4096, [1])
    assert (status, none["code"]) == (404, "model_not_found")


def test_health_shows_whether_requests_are_served():
    async def check(there):
        seen = []
        for state in ("up", "down"):
            there.models.state = state
            status, _, body = await there.get("/health")
            seen.append((status, json.loads(body)["status"]))
        there.models.state = "up"
        there.gateway.drain()
        status, _, body = await there.get("/health")
        return [*seen, (status, json.loads(body)["status"])]

    assert within(check) == [(200, "ok"), (503, "degraded"), (503, "draining")]


def test_health_and_metrics_answer_head_requests():
    async def check(there):
        return [(await there.get(path, method="HEAD"))[::2] for path in ("/health", "/metrics")]

    assert within(check) == [(200, b""), (200, b"")]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        *(
            (f"{path}/", path)
            for path in (COMPLETIONS, "/v1/models", "/v1/models/org", "/v1/files", "/health", "/rerank")
        ),
        (f"{COMPLETIONS}/?a=/&b=%2F", f"{COMPLETIONS}?a=/&b=%2F"),
        *(
            (path, None)
            for path in ("/v1/", "/", "/nowhere/", "//v1/models/", "/v1/files//", "//evil.example/", "/v1/models/x%2F")
        ),
    ],
)
def test_a_slash_at_the_end_is_a_redirect_as_of_vllm(path, target):
    """Recorded from vLLM 0.32. Its own redirects would name its own address, and the body is sent again on a 307."""

    async def check(there):
        ask = there.http.request("POST", URL(there.url + path, encoded=True), json=BODY, allow_redirects=False)
        async with ask as response:
            return response.status, response.headers.get("location"), there.engine.seen

    refused = 405 if path.startswith("/v1/models/") else 404
    assert within(check) == (307 if target else refused, target, [])


async def hello(request):
    return PlainTextResponse("hello " + request.query_params.get("who", ""))


ROUTES = (Route("/dashboard", hello, methods=["GET"]),)


def test_metrics_and_further_routes_on_the_same_port():
    async def check(there):
        pages = [await there.get(path) for path in ("/metrics", "/dashboard?who=you")]
        wrong = await there.get("/dashboard", method="DELETE")
        return [(status, body) for status, _, body in pages], wrong

    pages, (status, headers, body) = within(check, extra_routes=ROUTES)
    assert pages == [(200, b"up 1\n"), (200, b"hello you")]
    assert (status, headers["allow"]) == (405, "GET, HEAD") and error_of(body)


def test_metrics_on_a_separate_port():
    async def check(there):
        public = [(await there.get(path))[0] for path in ("/metrics", "/dashboard", "/health")]
        private = []
        for path in ("/metrics", "/dashboard", "/health", "/v1/models"):
            async with there.http.get(there.private + path) as response:
                assert response.headers["x-request-id"]
                private.append(response.status)
        return public, private

    options = ServerOptions(metrics_port=0, api_keys=("k",))
    public, private = within(check, server=options, extra_routes=ROUTES)
    assert (public, private) == ([401, 401, 200], [200, 200, 200, 404])


def test_every_path_but_health_needs_a_key():
    async def check(there):
        paths = ("/v1/models", "/metrics", "/v1/files", "/nowhere", "/health")
        without_key = [(await there.get(path))[0] for path in paths]
        key = {"authorization": "Bearer k"}
        with_key = [(await there.get(path, headers=key))[0] for path in paths]
        await there.post(COMPLETIONS, BODY, key)
        return without_key, with_key, there.engine.seen, there.session

    without_key, with_key, seen, session = within(check, server=ServerOptions(api_keys=("k",)))
    assert without_key == [401, 401, 401, 401, 200]
    assert with_key == [200, 200, 200, 404, 200]
    assert not any("authorization" in headers for _, _, headers, _ in seen)
    assert session.caller and session.caller != "k"


def test_a_clients_key_goes_to_the_engine_where_the_gateway_has_none():
    async def check(there):
        await there.post(COMPLETIONS, BODY | {"user": "u"}, {"Authorization": "Bearer theirs"})
        return there.engine.seen[0][2], there.session.caller

    headers, caller = within(check)
    assert (headers["authorization"], caller) == ("Bearer theirs", "u")


def test_slos_reach_the_session_but_not_the_engine():
    async def check(there):
        await there.post(COMPLETIONS, BODY, {"x-slo-class": "fast", "x-slo-tpot-ms": "20"})
        bad = await there.post(COMPLETIONS, BODY, {"x-slo-ttft-ms": "soon"})
        return (there.session.slo, there.session.slo_class), there.engine.seen[0][2], bad

    slo, headers, (status, _, body) = within(check, classes={"fast": Slo(ttft_s=0.1)}, slo=Slo(e2e_s=9))
    assert slo == (Slo(ttft_s=0.1, tbt_s=0.02), "fast")
    assert not any(name.startswith("x-slo") for name in headers)
    assert (status, error_of(body)["param"]) == (400, "x-slo-ttft-ms")


@pytest.mark.parametrize(
    ("tier", "headers", "slo"),
    [
        ("flex", {}, Slo(e2e_s=120.0, batch=True)),
        ("flex", {"x-slo-e2e-ms": "5000"}, Slo(e2e_s=5.0, batch=True)),
        ("flex", {"x-slo-class": "fast"}, Slo(ttft_s=0.1)),
        ("auto", {}, Slo()),
        (7, {}, Slo()),
    ],
)
def test_a_service_tier_stands_for_the_class_of_its_name(tier, headers, slo):
    classes = {"flex": Slo(e2e_s=120.0, batch=True), "fast": Slo(ttft_s=0.1)}

    async def check(there):
        await there.post(COMPLETIONS, BODY | {"service_tier": tier}, headers)
        return there.session.slo, json.loads(there.engine.seen[0][3])["service_tier"]

    assert within(check, classes=classes) == (slo, tier)


def test_the_engine_gets_the_request_unchanged_with_path_and_query():
    async def check(there):
        body = b'{ "model":"tiny", "prompt":"\\u00e4" }'
        await there.post(COMPLETIONS + "?a=%20b&c", body, {"x-request-id": "mine-1"})
        return body, there.engine.seen

    body, [(method, path, headers, got)] = within(check)
    assert (method, path, got) == ("POST", COMPLETIONS + "?a=%20b&c", body)
    assert headers["x-request-id"] == "mine-1"


def test_request_ids_are_kept_where_sane():
    async def check(there):
        ids = []
        for given in ("mine-1", "two words", "x" * 129):
            for path in ("/health", "/v1/files", "/nowhere"):
                _, headers, _ = await there.get(path, headers={"x-request-id": given})
                ids.append((given, headers.getall("x-request-id")))
        return ids

    for given, got in within(check):
        assert len(got) == 1 and (got == [given]) == (given == "mine-1")


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", COMPLETIONS, 405, "POST"),
        ("PUT", "/v1/files", 405, "GET, POST, DELETE"),
        ("POST", "/v1/models", 405, "GET"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("POST", "/v2/models/tiny/infer", 405, "GET"),
        ("GET", "/", 404, None),
        ("GET", "/v1", 404, None),
        ("GET", "/v1/", 404, None),
        ("POST", "/invocations", 404, None),
    ],
)
def test_unknown_paths_and_methods(method, path, status, allow):
    got, headers, body = within(lambda there: there.get(path, method=method))
    assert (got, headers.get("allow")) == (status, allow)
    assert error_of(body)["type"] == "invalid_request_error"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_other_paths_are_forwarded_without_control(method):
    async def check(there):
        answer = await there.get("/v1/files/a%2Bb?x=1", method=method)
        return *answer, there.engine.seen, there.models.sessions

    status, headers, body, seen, sessions = within(check)
    assert (status, body, sessions) == (200, b"\x00plain\xff", [])
    assert headers["x-engine"] == "yes" and "x-drop" not in headers and "connection" not in headers
    assert [(way, path) for way, path, *_ in seen] == [(method, "/v1/files/a%2Bb?x=1")]


def test_the_model_in_a_body_or_path_chooses_the_engine():
    async def check(there):
        return [
            (await there.post("/v1/embeddings", {"model": "none"}))[0],
            (await there.post("/v1/embeddings", {"model": "tiny"}))[0],
            (await there.post("/v1/audio", b"--form"))[0],
            (await there.get("/v2/models/none/config"))[0],
            (await there.get("/v2/models/tiny/config"))[0],
            (await there.get("/v2/health/ready"))[0],
        ]

    assert within(check) == [404, 200, 200, 404, 200, 200]


RAW = (
    "//evil/v1/x", "/v1//x", "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/%2E/x", "/v1/a%2Fb", "/v1/a\\b", "/v1/a%5Cb",
    "/v1/a%3Fb", "/v1/a%23b", "/v1/a%00b", "/v1/a%0Ab", "/v1/%ff", "/v1/chat/completions//", "/v1/../v1/completions",
)  # fmt: skip


def test_a_path_is_never_taken_for_another():
    async def check(there):
        host, port = there.url.removeprefix("http://").split(":")
        statuses = []
        for target in (*RAW, "http://evil.example/v1/files", "/v1/completion%73"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(
                f"POST {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode()
            )
            statuses.append(int((await reader.read()).split()[1]))
            writer.close()
            await writer.wait_closed()
        return statuses, [(path, headers["host"]) for _, path, headers, _ in there.engine.seen]

    statuses, seen = within(check)
    # An encoded name of a controlled path is controlled: its empty body is refused.
    assert statuses == [404] * len(RAW) + [200, 400]
    assert [path for path, _ in seen] == ["/v1/files"] and "evil" not in seen[0][1]


def test_a_rejection_carries_retry_after():
    async def check(there):
        there.models.reject = ApiError(429, "full", kind="rate_limit_error", code="queue_full", retry_after_s=3)
        answer = await there.post(COMPLETIONS, BODY)
        return *answer, there.session

    status, headers, body, session = within(check)
    assert (status, headers["retry-after"], error_of(body)["code"]) == (429, "3", "queue_full")
    assert session.ends == ["rejected"]


def test_an_unknown_model():
    status, _, body = within(lambda there: there.post(COMPLETIONS, BODY | {"model": "none"}))
    assert (status, error_of(body)["code"]) == (404, "model_not_found")


def test_a_fault_of_ours_is_logged_and_not_shown(caplog):
    async def check(there):
        there.models.broken = True
        return await there.post(COMPLETIONS, BODY, {"x-request-id": "find-me"})

    with caplog.at_level(logging.ERROR, "throttllem.gateway"):
        status, _, body = within(check)
    assert (status, error_of(body)["code"]) == (500, "internal_error") and b"secret" not in body
    assert "find-me" in caplog.text and "secret" in caplog.text


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit(announced):
    async def check(there):
        async def parts():
            for _ in range(100):
                yield b"x" * 1024

        data = b"x" * 102400 if announced else parts()
        async with there.http.post(there.url + COMPLETIONS, data=data) as response:
            return response.status, await response.read(), there.models.sessions

    status, body, sessions = within(check, limits=LimitOptions(body_bytes=4096))
    assert (status, error_of(body)["code"], sessions) == (413, "body_too_large", [])


def test_headers_over_the_limit():
    async def check(there):
        return await there.get("/health", headers={"x-long": "x" * 3000})

    status, _, body = within(check, limits=LimitOptions(header_bytes=2048))
    assert (status, error_of(body)["code"]) == (431, "headers_too_large")


def test_an_idle_gateway_forgets_its_requests():
    async def check(there):
        for _ in range(20):
            await there.post(COMPLETIONS, BODY)
            await there.get("/nowhere")
        await until(lambda: not there.gateway._open)
        await asyncio.wait_for(there.gateway.idle(), 1)

    within(check)
