from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.sse import MOST_BYTES, Splitter, data_of, is_whole

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


def test_an_event_without_end_is_not_kept():
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
