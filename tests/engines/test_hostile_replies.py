"""Hostile answers to the questions of the gateway: the engine is reached, with sane numbers, or an EngineError."""

import asyncio
import json
import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines.upstreams import raw
from tests.engines.vllm_peer import SPEC, VllmPeer
from throttllem.engines.base import EngineError, RemoteOptions
from throttllem.engines.capacity import MOST_CONTEXT_TOKENS
from throttllem.engines.http import MOST_HEADERS, PAGE_BYTES, Upstream
from throttllem.engines.kinds import MOST_BATCH, MOST_KV_BLOCKS, MOST_TOKENS
from throttllem.engines.openai import OpenaiEngine
from throttllem.printable import MOST_CHARACTERS, PrintableFormatter, printable

NUMBER = st.one_of(
    st.sampled_from(["NaN", "+Inf", "-1", "1e30", "0", "9" * 40, "", "١٢", "1.5", "x\x1b[2J", "4096"]),
    st.integers(-(10**30), 10**30).map(str),
)
VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
NAMES = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "process_start_time_seconds")
CACHE = "vllm:cache_config_info"
LINE = st.one_of(
    st.builds("{} {}\n".format, st.sampled_from(NAMES), NUMBER),
    st.tuples(NUMBER, NUMBER, NUMBER).map(
        lambda n: f'{CACHE}{{num_gpu_blocks="{n[0]}",block_size="{n[1]}",kv_cache_size_tokens="{n[2]}"}} 1\n'
    ),
    st.tuples(NUMBER, NUMBER, NUMBER).map(
        lambda n: f'throttllem_engine_info{{max_num_seqs="{n[0]}",engines="{n[1]}",boot="{n[2]}"}} 1\n'
    ),
    st.text(max_size=20).map(lambda text: f"vllm:num_requests_running{{{text}\n"),
)
PAGES = st.fixed_dictionaries(
    {
        "/v1/models": st.one_of(
            st.lists(st.fixed_dictionaries({"id": VALUE, "max_model_len": VALUE, "root": VALUE}), max_size=2).map(
                lambda models: json.dumps({"data": [{"id": "tiny"}, *models]}).encode()
            ),
            VALUE.map(lambda value: json.dumps({"data": value}).encode()),
            st.binary(max_size=20),
        ),
        "/metrics": st.lists(LINE, max_size=6).map(lambda lines: "".join(lines).encode("utf-8", "replace")),
        "/tokenize": st.one_of(
            VALUE.map(lambda value: json.dumps({"count": value, "tokens": value}).encode()), st.binary(max_size=20)
        ),
        "/version": VALUE.map(lambda value: json.dumps({"version": value}).encode()),
        "/server_info?config_format=json": VALUE.map(
            lambda value: json.dumps(
                {"vllm_config": {"scheduler_config": {"max_num_seqs": value, "max_num_batched_tokens": value}}}
            ).encode()
        ),
        "/props": VALUE.map(
            lambda value: json.dumps({"default_generation_settings": {"n_ctx": value}, "total_slots": value}).encode()
        ),
        "/get_server_info": VALUE.map(lambda value: json.dumps({"max_total_num_tokens": value}).encode()),
    }
)


def connected(pages):
    """What `connect` gives for an engine with these pages; the transport is left out."""
    upstream = OpenaiEngine(RemoteOptions(url="http://engine", kind="openai"), SPEC)

    async def ask(method, path, body, timeout_s, most_bytes):
        return (200, pages[path]) if path in pages else (404, b"")

    upstream._upstream._ask = ask
    return asyncio.run(upstream.connect())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PAGES)
def test_hostile_pages_are_read_or_refused(pages):
    try:
        found = connected(pages)
    except EngineError as error:
        assert str(error).isprintable()
        return
    spec = found.spec
    assert 0 < spec.kv_blocks <= MOST_KV_BLOCKS
    assert 0 < spec.max_batch <= MOST_BATCH
    assert 0 < spec.block_tokens <= MOST_TOKENS
    assert 0 < spec.max_context_tokens <= max(MOST_TOKENS, MOST_CONTEXT_TOKENS)
    assert 0 < spec.prefill_budget_tokens <= MOST_TOKENS
    assert all(text.isprintable() for text in (*found.models, *found.roots, found.version, *found.notes))


def test_lines_that_come_twice_count_once():
    page = VllmPeer().page().encode()
    pages = {"/v1/models": b'{"data": [{"id": "tiny", "max_model_len": 4096}]}', "/metrics": page + page}
    assert connected(pages).spec.kv_blocks == 4095


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (PAGE_BYTES + 1), "more than"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (MOST_HEADERS + 1) + b"content-length: 0\r\n\r\n", "speak HTTP"),
        (b"HTTP/1.1 200 OK\r\na: " + b"x" * 70_000 + b"\r\ncontent-length: 0\r\n\r\n", "speak HTTP"),
        (b"HTTP/1.1 100 Go\r\na: b\r\n\r\n" * 9000, "speak HTTP"),
        (b"HTTP/1.1 200 OK\r\na: \x1b[2J\r\ncontent-length: 0\r\n\r\n", "speak HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "speak HTTP"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "speak HTTP"),
        (b"HTTP/1.1 999 No\r\ncontent-length: 0\r\n\r\n", "speak HTTP"),
    ],
)
def test_a_reply_beyond_all_bounds_is_an_error(answer, why):
    async def reply(_, writer):
        writer.write(answer)
        await writer.drain()

    async def run():
        async with raw(reply) as url:
            upstream = Upstream(url)
            with pytest.raises(EngineError, match=why):
                await upstream.get("/metrics")
            await upstream.close()

    asyncio.run(run())


@given(st.text())
def test_no_text_reaches_a_log_or_terminal_with_control_characters(text):
    assert printable(text).isprintable()
    assert str(EngineError(text or "x")).isprintable()
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s", (text,), None)
    assert PrintableFormatter("%(message)s").format(record).isprintable()


def test_what_is_shown_is_bounded_and_tracebacks_keep_their_lines():
    assert len(printable("a" * 10**6)) < MOST_CHARACTERS + 50
    try:
        raise ValueError("\x1b[2J")
    except ValueError as error:
        record = logging.LogRecord("a", logging.INFO, "", 0, "m\nforged", (), (ValueError, error, error.__traceback__))
    lines = PrintableFormatter("%(message)s").format(record).split("\n")
    assert (lines[0], lines[-1]) == ("m\\nforged", "ValueError: \\x1b[2J")
