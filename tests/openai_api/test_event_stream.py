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


@pytest.mark.parametrize("size", [7, len(TOKEN), 4096])
def test_plain_events_are_no_more_tokens_than_there_can_be(size):
    data = TOKEN * 9
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    assert measured(chunks, most_tokens=4)[0] == 4


def test_an_endless_event_is_not_held():
    meter = Meter()
    for _ in range(40):
        meter.feed(b"x" * 65536)
    assert meter.feed(b"\n\n" + TOKEN) == 1


# ---- the engine's own counts ---------------------------------------------------------------------------------------


def said(delta=None, *, index=0, finish=None, usage=None, **choice):
    """A chat's chunk of one choice; `usage`: the completion tokens that it reports."""
    delta = {"content": "x"} if delta is None else delta
    chunk = {"choices": [{"index": index, "delta": delta, "finish_reason": finish, **choice}]}
    return chunk if usage is None else chunk | {"usage": {"prompt_tokens": 9, "completion_tokens": usage}}


def total(tokens, **details):
    return {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens, **details}}


LOGPROBS = {"content": [{"token": "x", "logprob": -1.0}] * 3}
DONE = b"data: [DONE]\n\n"


def counts(chunks, **about):
    """The tokens of each event, and the count at the end (None: an estimate)."""
    meter = Meter(**about)
    return [meter.feed(sse(chunk)) for chunk in chunks], meter.counted.output_tokens


@pytest.mark.parametrize(
    ("chunks", "tokens", "counted"),
    [
        ([said(), said()], [1, 1], None),
        ([said(usage=3), said(usage=6), said({}, finish="stop", usage=7)], [3, 3, 1], 7),
        ([said({"role": "assistant"}, usage=0), said(usage=4), said(), said(usage=9), total(9)], [0, 4, 1, 4, 0], 9),
        ([said(), said(), said({}, finish="length"), total(8)], [1, 1, 0, 0], 8),
        ([said(), said(finish="length", usage=8)], [1, 1], 8),
        ([said(usage=5), said(usage=3), said(usage=7)], [5, 0, 2], 7),
        ([said(), total(5), said(), total(9), said({}, finish="stop")], [1, 4, 1, 3, 0], 9),
        ([said(), {"usage": {"completion_tokens": 4}}, said(usage=6)], [1, 3, 2], 6),
        ([said(token_ids=[1, 2, 3]), said({"content": ""}, token_ids=[]), said({}, token_ids=[7])], [3, 0, 1], 4),
        ([said(token_ids=None), said(logprobs=None)], [1, 1], None),
        ([said(logprobs=LOGPROBS), said(logprobs={"content": None})], [3, 1], None),
        ([said(logprobs=LOGPROBS, finish="stop")], [3], 3),
        ([{"choices": [{"text": "xy", "logprobs": {"tokens": ["x", "y"]}}]}], [2], 2),
        ([{"choices": [{"text": "x"}, {"text": "y"}]}, {"choices": [{"text": "x"}]}], [2, 1], None),
        (
            [said({"reasoning_content": "x"}), said({"tool_calls": [{"index": 0}]}), said({"refusal": "x"})],
            [1] * 3,
            None,
        ),
        ([said(), said(usage=0), {**said(), "usage": None}, total(0)], [1, 1, 1, 0], None),
    ],
)
def test_the_engines_own_counts_come_first(chunks, tokens, counted):
    assert counts(chunks) == (tokens, counted)


@pytest.mark.parametrize("odd", [10**30, -5, 7.0, "7", True, [7], {}, 41])
def test_a_count_that_cannot_be_is_as_none(odd):
    chunks = [
        said(usage=odd),
        said(),
        {**said(), "usage": {"completion_tokens": odd}},
        said({}, finish="stop"),
        total(odd),
    ]
    assert counts(chunks, most_tokens=40) == ([1, 1, 1, 0, 0], None)
    assert counts([said(token_ids=[1] * 41)], most_tokens=40)[0] == [40]


@pytest.mark.parametrize(
    ("usages", "after", "counted"),
    [
        ([(0, 1), (1, 1), (0, 2), (1, 2)], 4, 4),
        ([(0, 3), (1, 3), (0, 6), (1, 6)], 12, 12),
        ([(0, 1), (1, 2), (0, 3), (1, 4)], 4, 4),
        ([(0, 3), (0, 6), (1, 3)], 9, 9),
        ([(1, 5), (0, 9)], 9, 9),
    ],
    ids=["each", "each several", "all", "one after the other", "all, several"],
)
def test_usage_beside_a_choice_is_that_choices_or_that_of_all(usages, after, counted):
    tokens, found = counts([said(index=index, usage=used) for index, used in usages], sequences=2, most_tokens=40)
    assert (sum(tokens), found) == (after, counted)


def test_log_probabilities_of_an_echoed_prompt_are_no_output():
    chunk = {"choices": [{"text": "a b c", "logprobs": {"tokens": ["a", " b", " c"]}}]}
    assert counts([chunk], echo=True) == ([1], None)


def test_cached_prompt_tokens_are_read_where_they_can_be():
    for cached, read in ((6, 6), (0, 0), (10, None), (-1, None), ("6", None), (10**30, None)):
        meter = Meter()
        meter.feed(sse(total(3, prompt_tokens_details={"cached_tokens": cached})))
        assert (meter.counted.prompt_tokens, meter.counted.cached_tokens) == (9, read)


reported = st.none() | st.integers(-3, 60) | st.just(10**30)
chunk = st.builds(
    lambda delta, index, finish, usage, choice: said(delta, index=index, finish=finish, usage=usage, **choice),
    st.sampled_from(
        [
            {"content": "x"},
            {"content": 'say "x"'},
            {},
            {"role": "assistant"},
            {"reasoning_content": "x"},
            {"content": ""},
        ]
    ),
    st.integers(0, 3),
    st.sampled_from([None, None, None, "stop"]),
    reported,
    st.sampled_from([{}, {"token_ids": [1, 2]}, {"logprobs": LOGPROBS}, {"token_ids": None, "logprobs": None}]),
)


@given(
    st.lists(chunk | st.builds(total, reported), max_size=12),
    st.integers(1, 3),
    st.lists(st.integers(0, 2000), max_size=12),
    st.sampled_from(["\n\n", "\r\n\r\n"]),
)
def test_counts_are_the_same_wherever_bytes_are_cut_and_never_more_than_there_can_be(chunks, sequences, cuts, blank):
    events = [f"data: {json.dumps(one)}{blank}".encode() for one in chunks]
    data = b"".join(events) + DONE
    whole = [0, *itertools.accumulate(map(len, events)), len(data)]
    cuts = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = []
    for edges in ([0, len(data)], whole, cuts):
        meter = Meter(sequences=sequences, most_tokens=50)
        tokens = [meter.feed(data[start:end]) for start, end in pairwise(edges)]
        assert min(tokens) >= 0 and meter.done and sum(tokens) <= 50
        found.append((sum(tokens), meter.counted))
    assert found[0] == found[1] == found[2]
