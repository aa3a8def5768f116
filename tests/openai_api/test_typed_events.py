"""Streams of typed events: tokens counted, ends and failures found, wherever the bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.upstream import message_events, response_events, typed
from throttllem.openai_api.typed_events import TypedMeter
from throttllem.openai_api.usage import Usage

STREAMS = {"responses": response_events(5), "messages": message_events(5)}


def measured(chunks):
    meter = TypedMeter()
    tokens = sum(map(meter.feed, chunks)) + meter.close()
    return tokens, meter.done, meter.failed, meter.used


@pytest.mark.parametrize("events", STREAMS.values(), ids=STREAMS)
@given(cuts=st.lists(st.integers(0, 3000), max_size=12))
def test_cut_anywhere_the_counts_are_the_same(events, cuts):
    data = b"".join(events)
    edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    assert measured([data[begin:end] for begin, end in pairwise(edges)]) == (5, True, False, 5)


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        (typed("response.reasoning_text.delta", delta="hm"), 1),
        (typed("response.function_call_arguments.delta", delta='{"a":'), 1),
        (typed("response.output_text.delta", delta=""), 0),
        (typed("response.output_text.done", text="all of it"), 0),
        (typed("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}), 1),
        (typed("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": '{"a"'}), 1),
        (typed("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "s"}), 0),
        (typed("content_block_delta", index=0, delta={"type": "text_delta", "text": '"type":"message_stop"'}), 1),
        (typed("ping"), 0),
        (b": keep-alive\n\n", 0),
    ],
)
def test_a_delta_of_any_output_is_a_token(event, tokens):
    assert measured([event]) == (tokens, False, False, None)


def test_without_event_lines_the_type_in_the_data_counts():
    for events in STREAMS.values():
        plain = [b"data: " + event.partition(b"data: ")[2] for event in events]
        moved = [event.replace(b'{"type"', b'{"sequence_number": 1, "type"', 1) for event in plain]
        assert measured(plain) == measured(moved) == (5, True, False, 5)


@pytest.mark.parametrize("kind", ["error", "response.failed"])
def test_a_failure_is_found(kind):
    assert measured([typed(kind, message="oh")]) == (0, False, True, None)


def test_cached_tokens_are_part_of_the_prompt():
    meter = TypedMeter()
    usage = {"input_tokens": 3, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 2, "output_tokens": 4}
    meter.feed(typed("message_delta", usage=usage))
    assert meter.counted == Usage(output_tokens=4, prompt_tokens=13, cached_tokens=8)
    details = {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 8}}
    meter.feed(typed("response.completed", response={"usage": details}))
    assert meter.counted == Usage(output_tokens=4, prompt_tokens=9, cached_tokens=8)


def test_anthropics_first_event_counts_the_prompt_and_no_output():
    meter = TypedMeter()
    meter.feed(typed("message_start", message={"usage": {"input_tokens": 3, "output_tokens": 1}}))
    assert meter.counted == Usage(prompt_tokens=3)


@pytest.mark.parametrize("count", [10**30, -1, 1.5, "4", None, True])
def test_a_count_that_cannot_be_is_none(count):
    meter = TypedMeter(most_tokens=100)
    meter.feed(typed("message_delta", usage={"output_tokens": count}))
    assert meter.used is None


def test_what_is_behind_the_last_event_is_no_part_of_the_stream():
    meter = TypedMeter()
    last = message_events(1)[-1]
    assert meter.feed(last + b"data: more\n\n") == 0 and meter.done and meter.surplus == len(b"data: more\n\n")
