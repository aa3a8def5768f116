"""Generated bodies and headers: every one is answered, none with an internal error."""

import asyncio
import itertools
import json

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.gateway.fakes import running

PATHS = ("/v1/completions", "/v1/chat/completions", "/v2/models/tiny/generate", "/v1/embeddings")
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "best_of", "stream", "user",
    "throttllem", "text_input", "stream_options", "metrics", "role", "content",
)  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["tiny", "x", 10**30])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=6,
)
near = {"model": "tiny", "prompt": "x", "text_input": "x", "messages": [{"role": "user", "content": "x"}]}
bodies = st.builds(lambda fields: near | fields, st.dictionaries(st.sampled_from(FIELDS), values, max_size=3)) | values


@st.composite
def broken(draw):
    """JSON-like bytes: whole, cut short, with other bytes between."""
    data = bytearray(json.dumps(draw(bodies)).encode())
    if draw(st.integers(0, 3)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    if draw(st.integers(0, 3)) == 0:
        data[draw(st.integers(0, len(data))) :][:0] = draw(st.binary(max_size=5))
    return bytes(data)


NAMES = (
    "x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms", "x-throttllem-metrics", "x-request-id", "x-other",
    "authorization", "content-type", "accept-encoding", "te", "connection", "cookie",
)  # fmt: skip
texts = st.sampled_from(["1", "0", "-1", "nan", "fast", "close", "gzip", "1e999", "identity;q=x"])
texts |= st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=12)
requests = st.tuples(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), texts, max_size=3), broken())


def generated(count):
    found = []

    @settings(
        max_examples=count // 10, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(requests, min_size=10, max_size=10))
    def gather(some):
        found.extend(some)

    gather()
    return found


def raw(path, headers, body):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode("latin-1") + b"\r\n" + body


async def answer(reader):
    """Status and body of one response."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split()[1])
    if b"content-length: " in head:
        return status, await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0])), head
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return status, body, head


async def answers(there, some):
    """The answers on one connection, which is opened again where the gateway closes it."""
    host, port = there.url.removeprefix("http://").split(":")
    seen, writer = [], None
    for path, headers, body in some:
        if writer is None:
            reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw(path, headers, body))
        status, got, head = await asyncio.wait_for(answer(reader), 10)
        seen.append((status, got, path, headers, body))
        if b"connection: close" in head:
            writer.close()
            await writer.wait_closed()
            writer = None
    if writer is not None:
        writer.close()
        await writer.wait_closed()
    return seen


def test_a_thousand_malformed_requests():
    async def main():
        some = generated(1000)
        async with running() as there:
            seen = await asyncio.gather(*(answers(there, some[lane::8]) for lane in range(8)))
            return list(itertools.chain(*seen)), there.models.sessions, len(some)

    seen, sessions, count = asyncio.run(main())
    assert len(seen) == count >= 900
    for status, body, *request in seen:
        assert status < 500, (status, body, request)
        assert status < 400 or json.loads(body)["error"]["type"] == "invalid_request_error", (status, body, request)
    assert all(len(session.ends) == 1 for session in sessions)
    # Neither all refused nor all served: the generator reaches both sides.
    assert {200, 400} <= {status for status, *_ in seen}
