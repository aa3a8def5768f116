"""CORS, and the hosts and pages that a gateway without keys serves: DNS rebinding, and requests across sites."""

import asyncio
import json
import socket

import pytest

from tests.gateway.chromium import CHROMIUM, browse
from tests.gateway.fakes import running
from throttllem.config import ServerOptions
from throttllem.core.types import OptionError
from throttllem.gateway.http.origins import Guard
from throttllem.openai_api.errors import ApiError
from throttllem.option_sources import load_options

PATH = "/v1/completions"
BODY = {"model": "tiny", "prompt": "x"}
STREAM = BODY | {"stream": True}
PAGE = "https://chat.example.org"
OTHER = "https://evil.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-slo-class, x-slo-ttft-ms, x-api-key",
}
METHOD = "access-control-request-method"
ALLOWED = "access-control-allow-origin"


def asked(*requests, **server):
    """Status, headers and body of each answer to (path, body or method, headers), and the engine's requests."""

    async def main():
        async with running(server=ServerOptions(**server)) as there:
            found = []
            for path, body, headers in requests:
                ask = there.get(path, body, headers) if isinstance(body, str) else there.post(path, body, headers)
                found.append(await ask)
            return found, there.engine.seen

    return asyncio.run(main())


def error_code(found):
    return found[0], json.loads(found[2])["error"]["code"] if found[0] >= 400 else None


# ---- CORS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [None, ("k",)])
def test_a_preflight_of_an_allowed_page_needs_no_key(keys):
    pages = [(PATH, "OPTIONS", PREFLIGHT | {"origin": origin}) for origin in (PAGE, OTHER)]
    (allowed, other), seen = asked(*pages, allowed_origins=(PAGE,), api_keys=keys)
    assert allowed[0] == 200 and allowed[1][ALLOWED] == PAGE and "POST" in allowed[1]["access-control-allow-methods"]
    asked_for = PREFLIGHT["access-control-request-headers"]
    assert allowed[1]["access-control-allow-headers"] == asked_for and "Origin" in allowed[1]["vary"]
    assert error_code(other) == (400, "origin_not_allowed") and b"--allowed-origins " + OTHER.encode() in other[2]
    assert ALLOWED not in other[1] and seen == []
    ((odd,), _) = asked((PATH, "OPTIONS", PREFLIGHT | {"origin": PAGE, METHOD: "odd"}), allowed_origins=(PAGE,))
    assert error_code(odd) == (400, "method_not_allowed")


def test_a_page_may_read_outputs_streams_and_errors():
    page, key = {"origin": PAGE}, {"authorization": "Bearer k"}
    requests = [
        (PATH, BODY, page | key),
        (PATH, STREAM, page | key),
        (PATH, BODY, page),  # no key
        (PATH, b"{", page | key),
        (PATH, BODY | {"play": "refuse"}, page | key),
        ("/v1/models", "GET", page | key),
        ("/nowhere", "GET", page | key),
    ]
    found, _ = asked(*requests, allowed_origins=("http://a.example", PAGE), api_keys=("k",))
    assert [status for status, _, _ in found] == [200, 200, 401, 400, 503, 200, 404]
    for _, headers, _ in found:
        assert headers[ALLOWED] == PAGE and headers["vary"] == "Origin"
        assert "x-request-id" in headers["access-control-expose-headers"]


def test_every_page():
    (preflight, output), _ = asked(
        (PATH, "OPTIONS", PREFLIGHT | {"origin": OTHER}), (PATH, STREAM, {"origin": "null"}), allowed_origins=("*",)
    )
    assert preflight[1][ALLOWED] == output[1][ALLOWED] == "*" and output[0] == 200


def test_without_the_option_there_is_no_cors():
    (found, options), _ = asked((PATH, BODY, {}), (PATH, "OPTIONS", PREFLIGHT))
    assert not [name for name in found[1] if name.lower().startswith("access-control")] and options[0] == 405


@pytest.mark.parametrize("origin", ["chat.example.org", PAGE + "/", "https://*.example.org", "https://A.example", ""])
def test_what_is_no_origin_is_an_error(origin):
    with pytest.raises(OptionError, match=r"server\.allowed_origins"):
        ServerOptions(allowed_origins=(origin,))


def test_lists_as_vllm_writes_them():
    for text in (f'["{PAGE}", "null"]', f"{PAGE}, null"):
        found = load_options(settings=[f"server.allowed_origins={text}"]).options.server
        assert found.allowed_origins == (PAGE, "null")


# ---- without keys ----------------------------------------------------------------------------------------------

OWN = ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000", "10.0.0.5:8000", "gpubox:8000", "api.localhost"]


def verdict(server, **headers):
    try:
        Guard(server).check(headers)
    except ApiError as error:
        assert error.status == 403 and "server.api" not in error.code
        return error.code
    return None


@pytest.mark.parametrize(
    "host", [*OWN, "[fe80::1]", "192.168.1.9", "llm.example.org:80", "a.b.example.net", "localhost."]
)
def test_known_hosts(host):
    server = ServerOptions(allowed_hosts=("LLM.example.org", "*.example.net"))
    assert verdict(server, host=host) is verdict(server) is None


def test_the_names_of_the_machine_and_of_private_networks():
    named = ServerOptions(host="gpu.example.org")
    assert verdict(named, host="gpu.example.org:8000") is verdict(named, host=socket.gethostname()) is None
    for host in ("llm.svc.cluster.local", "llm.internal:8000", "gpu1.corp"):
        assert verdict(ServerOptions(host="0.0.0.0"), host=host) is None
        assert verdict(ServerOptions(), host=host) == "host_not_allowed", "another machine may claim it here"
    assert verdict(ServerOptions(allowed_hosts=("*",)), host="evil.example") is None


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "example.net"],
)
def test_other_hosts_are_refused(host):
    """The page of evil.example, a name that resolves to 127.0.0.1 by now, is of the same site as the gateway."""
    server = ServerOptions(allowed_hosts=("*.example.net",))
    assert verdict(server, host=host, origin=f"http://{host}") == "host_not_allowed"


@pytest.mark.parametrize(
    "origin", [OTHER, "null", "http://localhost:3000", "http://127.0.0.1", "app://obsidian.md", ""]
)
def test_other_pages_are_refused(origin):
    assert verdict(ServerOptions(), host="127.0.0.1:8000", origin=origin) == "origin_not_allowed"
    if origin:
        assert verdict(ServerOptions(allowed_origins=(origin,)), host="127.0.0.1:8000", origin=origin) is None


def test_pages_of_the_gateway_itself_may_call_it():
    for scheme in ("http", "https"):
        assert verdict(ServerOptions(), host="10.0.0.5:8000", origin=f"{scheme}://10.0.0.5:8000") is None


def test_a_form_of_another_site_reaches_no_engine():
    """The browser sends `text/plain` without a preflight."""
    form = {"origin": OTHER, "content-type": "text/plain"}
    rebound = {"host": "evil.example:8000"}
    others = [("/metrics", "GET", rebound), ("/dashboard/state", "GET", rebound), ("/v1/files", "POST", form)]
    found, seen = asked((PATH, BODY, form), (PATH, BODY, rebound), *others, ("/health", "GET", rebound))
    assert [error_code(one) for one in found] == [
        *((403, code) for code in ("origin_not_allowed", "host_not_allowed", "host_not_allowed", "host_not_allowed")),
        *((403, "origin_not_allowed"), (200, None)),
    ]
    assert "--allowed-origins https://evil.example" in found[0][2].decode()
    assert "--set server.allowed_hosts=evil.example" in found[1][2].decode() and seen == []


@pytest.mark.parametrize(("keys", "statuses"), [(None, [403, 403, 200, 200]), (("k",), [200, 200, 200, 200])])
def test_the_metrics_port_is_checked_likewise(keys, statuses):
    async def main():
        async with running(server=ServerOptions(metrics_port=0, api_keys=keys)) as there:
            found = []
            for headers in ({"host": "evil.example"}, {"origin": OTHER}, {"host": "10.0.0.5:9090"}, {}):
                async with there.http.get(there.private + "/metrics", headers=headers) as response:
                    found.append(response.status)
            return found

    assert asyncio.run(main()) == statuses


def test_with_keys_a_page_needs_one_and_nothing_else():
    key = {"authorization": "Bearer k", "origin": OTHER, "host": "evil.example", "content-type": "text/plain"}
    ((status, _, _),), seen = asked((PATH, BODY, key), api_keys=("k",))
    assert status == 200 and len(seen) == 1


def test_text_is_no_matter_where_no_page_sends_it():
    ((status, _, _),), _ = asked((PATH, BODY, {"content-type": "text/plain"}))
    assert status == 200


@pytest.mark.parametrize("hosts", [("*x",), ("http://a.example",), ("a.example:80",), ("",), ("a/b",)])
def test_what_is_no_host_is_an_error(hosts):
    with pytest.raises(OptionError, match=r"server\.allowed_hosts"):
        ServerOptions(allowed_hosts=hosts)


@pytest.mark.parametrize("name", ["host", "authorization", "x-slo-e2e-ms", "content-encoding"])
def test_a_header_of_which_one_can_hold_is_there_once(name):
    async def main():
        async with running() as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /v1/models HTTP/1.1\r\n{name}: x\r\n{name}: y\r\nconnection: close\r\n\r\n".encode())
            found = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return found

    found = asyncio.run(main())
    assert found.startswith(b"HTTP/1.1 400 ") and f'"param":"{name}"'.encode() in found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser():
    """A page of one gateway calls another: it reads what it may, and its form reaches nothing."""
    call = """fetch(%s, {method: 'POST', mode: %s, headers: %s, body: %s})
        .then(reply => reply.text(), error => 'refused')"""
    slo = {"content-type": "application/json", "authorization": "Bearer x", "x-slo-ttft-ms": "900"}

    async def main():
        async with (
            running() as site,
            running(server=ServerOptions(allowed_origins=(site.url,))) as open_to_it,
            running() as closed,
            browse(site.url + "/health") as tab,
        ):
            await tab.until(f"location.href == '{site.url}/health'")
            calls = [(open_to_it, "cors", slo), (closed, "cors", slo), (closed, "no-cors", {})]
            got = []
            for there, mode, headers in calls:
                values = (there.url + PATH, mode, headers, json.dumps(STREAM))
                got.append(await tab.value(call % tuple(map(json.dumps, values))))
            return *got, open_to_it.engine.seen, closed.engine.seen

    streamed, refused, form, served, closed = asyncio.run(main())
    assert streamed.endswith("data: [DONE]\n\n") and refused == "refused" and form == ""
    assert len(served) == 1 and closed == []
