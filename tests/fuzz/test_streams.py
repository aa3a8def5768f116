"""Streams of an engine: however bytes are cut the same is counted, never less than nothing, never more than can be."""

import json

from hypothesis import strategies as st

from tests.fuzz.properties import cuts, fuzzed, mutated, pieces
from tests.gateway.upstream import chat_events, completion_events, message_events, response_events
from throttllem.openai_api.event_stream import Meter, Splitter
from throttllem.openai_api.typed_events import TypedMeter
from throttllem.openai_api.usage import MOST_TOKENS, choices_in, tokens_in, usage_in

MOST = 50
PARTS = [
    b"\n\n", b"\r\n\r\n", b"\r", b"\n", b"data: ", b"data:", b"event: error\n", b"[DONE]", b'"usage"', b'"choices":[]',
    b'"completion_tokens":9', b'"delta"', b'"text"', b'"finish_reason":"stop"', b'"token_ids":[1,2]', b"null",
    b'"', b"{}",
    b'{"usage":{"completion_tokens":1e99}}', b'"logprobs":{"content":[{},{}]}', b'"index":1', b": c\n\n",
]  # fmt: skip
OPENAI = [b"".join(chat_events(4, usage=True)), b"".join(completion_events(3)), b"".join(chat_events(2)) * 2]
TYPED = [b"".join(response_events(3)), b"".join(message_events(3))]


def counted(meter, chunks):
    tokens = []
    for chunk in chunks:
        tokens.append(meter.feed(chunk))
        if meter.done:
            break
    tokens.append(meter.close())
    assert min(tokens) >= 0
    used = meter.used
    assert used is None or 0 <= used <= MOST * 3
    for count in (meter.counted.output_tokens, meter.counted.prompt_tokens, meter.counted.cached_tokens):
        assert count is None or 0 <= count <= 3 * MOST_TOKENS
    assert meter.surplus >= 0
    return sum(tokens), meter.done, meter.failed, meter.counted


@fuzzed(data=mutated(*OPENAI, tokens=PARTS), cuts=cuts, sequences=st.integers(1, 3), native=st.booleans())
def test_a_stream_is_counted_the_same_however_it_is_cut(data, cuts, sequences, native):
    def meter():
        return Meter(sequences=sequences, most_tokens=MOST, native=native)

    once, often = counted(meter(), [data]), counted(meter(), pieces(data, cuts))
    assert max(once[0], often[0]) <= MOST + data.count(b"data:")
    # Two carriage returns may be cut before the line feed that belongs to them, as may `[DONE]` before the blank line.
    if b"\r" not in data and not once[1]:
        assert once == often
    assert counted(meter(), [data[at : at + 1] for at in range(len(data))])[0] >= 0


@fuzzed(data=mutated(*TYPED, tokens=[*PARTS, b"event: message_stop\n", b"event: response.failed\n"]), cuts=cuts)
def test_a_stream_of_typed_events_is_counted_the_same_however_it_is_cut(data, cuts):
    once = counted(TypedMeter(most_tokens=MOST), [data])
    often = counted(TypedMeter(most_tokens=MOST), pieces(data, cuts))
    assert max(once[0], often[0]) <= MOST
    if b"\r" not in data and not once[1]:
        assert once == often


@fuzzed(data=mutated(*OPENAI, *TYPED, tokens=PARTS), cuts=cuts)
def test_no_byte_of_a_stream_is_lost(data, cuts):
    splitter = Splitter()
    found = [event for chunk in pieces(data, cuts) for event in splitter.feed(chunk)]
    assert b"".join(found) + splitter.rest() == data


REPLY = {
    "choices": [{"index": 0, "token_ids": [1], "logprobs": {"content": [{}], "tokens": ["x"]}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}
TYPED_USAGE = {
    "usage": {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 2}
}


@fuzzed(
    body=mutated(
        json.dumps(REPLY).encode(), json.dumps(TYPED_USAGE).encode(),
        tokens=[b"null", b"-1", b"1e9", b"9" * 30, b"[]", b"{}", b"true", b'"3"', b"[[1]]"],
    )
)  # fmt: skip
def test_counts_of_a_reply_are_none_or_can_be(body):
    try:
        fields = json.loads(body)
    except ValueError:
        return
    if not isinstance(fields, dict):
        return
    usage = usage_in(fields.get("usage"), MOST)
    assert usage.output_tokens is None or 0 <= usage.output_tokens <= MOST
    assert usage.prompt_tokens is None or 0 <= usage.prompt_tokens <= 3 * MOST_TOKENS
    assert usage.cached_tokens is None or usage.cached_tokens <= (usage.prompt_tokens or MOST_TOKENS)
    for choice in choices_in(fields):
        count = tokens_in(choice)
        assert count is None or 0 <= count <= len(body)
