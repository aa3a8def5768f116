"""Replies of an engine: whatever it sends and however it is framed, a reply within bounds or an EngineError."""

import asyncio
import json

from hypothesis import strategies as st

from tests.engines.upstreams import call, raw, whole
from tests.engines.vllm_peer import SPEC
from tests.fuzz.properties import cuts, fuzzed, mutated, pieces
from throttllem.engines.base import EngineError, RemoteOptions
from throttllem.engines.capacity import MOST_NAMES, engine_spec, read_capacities
from throttllem.engines.http import Upstream, parsed

REPLIES = [
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n3;x=y\r\nabc\r\n0\r\nx-t: 1\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nconnection: close\r\n\r\nuntil the end",
    b"HTTP/1.1 204 No Content\r\nconnection: keep-alive, x-a\r\nx-a: 1\r\n\r\n",
    b"HTTP/1.0 500 Oh\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{\"error\": 1}",
]  # fmt: skip
FRAMING = [
    b"\r\n", b"\r\n\r\n", b"\n", b"content-length: 7\r\n", b"content-length: -1\r\n",
    b"content-length: 99999999999999999999\r\n",
    b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip\r\n",
    b"upgrade: h2c\r\nconnection: upgrade\r\n", b"ffffffffffffffffff\r\n",
    b"0\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n", b"HTTP/1.1 099\r\n", b"x: \x00\r\n", b": x\r\n",
    b" folded\r\n", b"304",
]  # fmt: skip


@fuzzed(sent=mutated(*REPLIES, tokens=FRAMING) | st.binary(max_size=60), cuts=cuts)
def test_any_bytes_are_a_reply_or_an_error(sent, cuts):
    async def run():
        answered = asyncio.Event()

        async def answer(reader, writer):
            for piece in pieces(sent, cuts[:3]):
                writer.write(piece)
                await asyncio.sleep(0)
            answered.set()

        async with raw(answer) as url, asyncio.timeout(2):
            upstream = Upstream(url)
            try:
                reply, body = await whole(upstream, call())
                assert 200 <= reply.status <= 999 and len(body) <= len(sent)
                assert all("\r" not in value and "\n" not in value for _, value in reply.headers)
            except EngineError as error:
                assert 500 <= error.status <= 504 and str(error)
            finally:
                await upstream.close()
            assert not upstream._all and not upstream._idle
            await answered.wait()

    asyncio.run(run())


class Pages:
    """An Upstream that has these pages."""

    url = "http://engine"

    def __init__(self, pages):
        self.pages = pages

    async def get(self, path, *, timeout_s=5.0):
        page = self.pages.get(path.partition("?")[0])
        return (404, b"") if page is None else (200, page)

    async def get_json(self, path, *, timeout_s=5.0):
        status, page = await self.get(path)
        if status != 200:
            raise EngineError("404")
        return parsed(path, page)


METRICS = (
    b'vllm:num_requests_running{engine="0"} 1.0\nprocess_start_time_seconds 1.7e9\n'
    b'vllm:cache_config_info{num_gpu_blocks="100",block_size="16",kv_cache_size_tokens="1600",cache_dtype="auto"} 1.0\n'
    b'throttllem_engine_info{max_num_seqs="8",max_num_batched_tokens="512",engines="1",'
    b'api_servers="1",boot="7",stats="/x"} 1.0\n'
)  # fmt: skip
MODELS = b'{"data": [{"id": "tiny", "root": "a/b", "max_model_len": 4096}]}'
OTHERS = {
    "/props": {"default_generation_settings": {"n_ctx": 4096}, "total_slots": 4},
    "/get_server_info": {
        "page_size": 16,
        "max_total_num_tokens": 1600,
        "context_length": 99,
        "max_running_requests": 4,
    },
    "/info": {"max_batch_total_tokens": 1600, "max_total_tokens": 99, "max_batch_size": 4},
    "/api/ps": {"models": [{"name": "tiny", "context_length": 99}]},
    "/server_info": {"vllm_config": {"scheduler_config": {"max_num_seqs": 8, "max_num_batched_tokens": 512}}},
}
ODD = [
    b"null", b"-1", b"0", b"true", b"1e99", b"9" * 30, b"9" * 5000, b'"x"', b"[]", b"{}", b'""',
    b'"\\u001b[2J"', b'"\n', b"NaN",
    b'="', b"\xc2\xb2", b"\xd9\xa3", b"engines", b"\n", b"} 1\n", b'"-5"', b'"0"',
]  # fmt: skip
page = mutated(*(json.dumps(each).encode() for each in OTHERS.values()), tokens=ODD)


@fuzzed(
    metrics=mutated(METRICS, METRICS[: METRICS.rindex(b"throttllem")], b"", tokens=ODD),
    models=mutated(MODELS, tokens=ODD),
    path=st.sampled_from(sorted(OTHERS)),
    page=page,
)
def test_any_pages_are_capacities_that_can_be_or_an_error(metrics, models, path, page):
    upstream = Pages({"/health": b"", "/metrics": metrics, "/v1/models": models, "/version": page, path: page})
    try:
        reported = asyncio.run(read_capacities(upstream, need_batch=True))
    except EngineError as error:
        assert str(error)
        return
    assert 0 < len(reported.models) <= MOST_NAMES
    spec, notes = engine_spec(reported, RemoteOptions(url="http://engine", kind="openai"), SPEC)
    sizes = (spec.kv_blocks, spec.block_tokens, spec.max_batch, spec.max_context_tokens, spec.prefill_budget_tokens)
    assert all(type(size) is int and 0 < size <= 1 << 40 for size in sizes), sizes
    assert reported.engines >= 1 and reported.api_servers >= 1 and all(isinstance(note, str) for note in notes)
