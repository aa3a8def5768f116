import itertools
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.upstream import chat_chunk, chat_events, completion_events, sse
from throttllem.openai_api.event_stream import MOST_BYTES, Meter, Splitter, data_of, is_whole

TOKEN = b'data: {"choices": [{"text": "x"}]}\n\n'

pieces = st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b"data:", b"a", b": c"]), max_size=40).map(
    b"".join
)


@given(st.binary(max_size=200) | pieces, st.lists(st.integers(0, 200), max_size=20))
def test_cut_anywhere_the_events_are_the_same(data, cuts):
    once, often = Splitter(), Splitter()
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    found = [event for begin, end in pairwise(edges) for event in often.feed(data[begin:end])]
    assert all(map(is_whole, found))
    assert b"".join(found) + often.rest() == data
    # A blank line of two carriage returns may be cut before the line feed that belongs to it.
    if b"\r" not in data:
        assert found == once.feed(data)


def test_an_event_without_end_is_not_held():
    splitter = Splitter()
    chunks = [b"data: " + b"x" * MOST_BYTES, b"y" * 100, b"\n\n", b"data: z\n\n"]
    assert [splitter.feed(chunk) for chunk in chunks] == [[chunks[0]], [], [b"y" * 100 + b"\n\n"], [chunks[3]]]
    assert not is_whole(chunks[0]) and splitter.rest() == b""


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b" x"),
        (b"data:x\r\n\r\n", b"x"),
        (b"id: 1\rdata:x\rdata:y\r\r", b"x\ny"),
        (b": data: x\n\n", None),
        (b"\ndata:", b""),
    ],
)
def test_data_of_an_event(event, data):
    assert data_of(event) == data


# ---- tokens ------------------------------------------------------------------------------------------------------


def measured(chunks, **api):
    meter = Meter(**api)
    tokens = sum(map(meter.feed, chunks)) + meter.close()
    return tokens, meter.done, meter.failed, meter.used


def compact(events):
    """As vLLM writes JSON: without blanks."""
    return [
        event
        if b"[DONE]" in event
        else b"data: " + json.dumps(json.loads(event[6:]), separators=(",", ":")).encode() + b"\n\n"
        for event in events
    ]


@pytest.mark.parametrize("written", [list, compact])
def test_counts_what_carries_content(written):
    assert measured(written(completion_events(5))) == (5, True, False, None)
    assert measured(written(chat_events(5))) == (5, True, False, None)
    assert measured(written(chat_events(5, usage=True))) == (5, True, False, 5)


@pytest.mark.parametrize(
    ("delta", "tokens"),
    [
        ({"role": "assistant", "content": ""}, 0),
        ({"role": "assistant", "content": None, "refusal": None}, 0),
        ({"role": "assistant"}, 0),
        ({}, 0),
        ({"content": ""}, 1),
        ({"content": "x"}, 1),
        ({"role": "assistant", "content": "x"}, 1),
        ({"content": '"choices":[] data: [DONE] "delta":{}'}, 1),
        ({"content": None, "reasoning_content": "x"}, 1),
        ({"tool_calls": [{"index": 0}]}, 1),
    ],
)
def test_chunks_that_only_open_or_close_are_no_tokens(delta, tokens):
    assert measured([sse(chat_chunk(delta))])[0] == tokens
    assert measured(compact([sse(chat_chunk(delta))]))[0] == tokens


def test_other_kinds_of_events():
    chunk = b'event: x\nid: 7\ndata: {"choices": [{"text": "x"}]}\n\n'
    assert measured([b": ping\n\n", chunk, b"retry: 5\n\n", b'data: {"ping": 1}\n\n'])[0] == 1
    assert measured([b"data:[DONE]\n\n"])[:2] == (0, True)
    assert measured([b'data: {"choices": [], "usage": null}\n\n'])[0] == 0
    native = b'data: {"text_output": "x", "error": null}\n\n'
    assert measured([native, b'data: {"choices": [{}]}\n\n'], native=True)[:3] == (1, False, False)
    assert measured([native])[:3] == (0, False, False)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error": {"message": "x"}}',
        b'data: {"error":"x"}',
        b'data: { "error" : "x"}',
        b'data: {"object":"error","message":"x","code":400}',
        b'data: {"id": 1, "error": {"message": "x"}}',
        b"event: error\ndata: out of memory",
        b"id: 1\r\nevent:error\r\ndata: {}",
    ],
)
def test_an_engines_error_is_seen(error, native):
    assert measured([error + b"\n\n"], native=native)[:3] == (0, False, True)


def test_last_event_may_lack_its_blank_line():
    assert measured([TOKEN + b"data: [DONE]"])[:2] == (1, True)


@pytest.mark.parametrize(
    ("chunks", "whole"),
    [
        ([], False),
        ([TOKEN], False),
        ([TOKEN, b"data: [DONE]\n\n"], True),
        ([TOKEN, b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'], True),
        ([b'data: {"choices":[{"text":"x","finish_reason":"length"}]}\n\n', b'data: {"choices":[]}\n\n'], True),
        ([b'data: {"choices":[{"text":"\\"finish_reason\\":\\"stop\\""}]}\n\n'], False),
        ([b'data: {"ping": 1}\n\n'], False),
    ],
)
def test_whether_the_answer_is_complete(chunks, whole):
    for native in (False, True):
        meter = Meter(native=native)
        for chunk in chunks:
            meter.feed(chunk)
        meter.close()
        assert meter.whole is (whole or native)


STREAM = chat_events(6, usage=True)[:-1] + completion_events(3)


@given(
    cuts=st.lists(st.integers(0, len(b"".join(STREAM))), max_size=30),
    ends=st.lists(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"]), min_size=len(STREAM), max_size=len(STREAM)),
)
def test_tokens_are_the_same_wherever_events_are_cut(cuts, ends):
    data = b"".join(event.removesuffix(b"\n\n") + end for event, end in zip(STREAM, ends, strict=True))
    cuts = [0, *sorted(cuts), len(data)]
    chunks = [data[start:end] for start, end in itertools.pairwise(cuts)]
    assert measured(chunks) == (9, True, False, 6)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_nothing_counts_behind_done(size):
    data, more = b"".join(chat_events(2)), TOKEN + b'data: {"error": {}}\n\n' + TOKEN[:9]
    meter, behind = Meter(), b""
    for at in range(0, len(data + more), size):
        chunk = (data + more)[at : at + size]
        meter.feed(chunk)
        if meter.done:
            behind = chunk[len(chunk) - meter.surplus :]
            break
    assert (meter.done, meter.failed) == (True, False) and more.startswith(behind)
    assert size < 1000 or behind == more


@given(st.binary(max_size=300), st.integers(1, 300))
def test_garbage_is_bounded_however_it_is_cut(data, size):
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    assert measured(chunks)[0] <= data.count(b'"choices"') + data.count(b'"delta"')


def test_an_endless_event_is_not_held():
    meter = Meter()
    for _ in range(40):
        meter.feed(b"x" * 65536)
    assert meter.feed(b"\n\n" + TOKEN) == 1
