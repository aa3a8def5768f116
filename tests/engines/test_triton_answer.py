import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.triton.answer import DONE, Answer, Chunks, Events, Named, Stops, Usage, whole


def event(**fields):
    return b"data: " + json.dumps({"model_name": "ensemble", "model_version": "1"} | fields).encode() + b"\n\n"


def stream(*texts):
    return b"".join(event(text_output=text) for text in texts)


def cut(data, places):
    """The bytes in pieces, cut at these places."""
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(bounds)]


texts = st.lists(st.text(alphabet='ab é\n"\\データ😀', max_size=5), min_size=1, max_size=8)
places = st.lists(st.integers(0, 10_000), max_size=12)


@given(texts, places)
def test_events_may_be_cut_anywhere(texts, places):
    data = b"".join(
        b"data: " + json.dumps({"text_output": text}, ensure_ascii=False).encode() + b"\n\n" for text in texts
    )
    events = Events()
    found = [event["text_output"] for piece in cut(data, places) for event in events.feed(piece)]
    assert found == texts


@given(texts, places, st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3))
def test_the_answer_is_the_text_before_the_first_stop_word(texts, places, words):
    full = "".join(texts)
    ends = [full.find(word) for word in words if word in full]
    answer = Answer(limit=1000, stops=tuple(words))
    shown = "".join(text for piece in cut(stream(*texts), places) for text in answer.feed(piece)) + answer.rest()
    if not ends:
        assert (shown, answer.over) == (full, False)
    else:
        # Which stop word came first in time decides; another may begin earlier but end later.
        assert full.startswith(shown)
        assert any(full.startswith(word, len(shown)) for word in words)
        assert answer.over and answer.reason == "stop"
    assert not any(word in shown for word in words)


def test_a_stop_word_over_several_tokens_is_kept_back():
    stops = Stops(("STOP",))
    assert [stops.feed(text) for text in ("a S", "TO", "x", "ST", "OP!", "more")] == ["a ", "", "STOx", "", "", ""]
    assert stops.reached
    held = Stops(("STOP",))
    assert (held.feed("a ST"), held.rest(), held.rest()) == ("a ", "ST", "")


@pytest.mark.parametrize(
    ("texts", "limit", "tokens", "reason"),
    [
        (("a", "b", "c"), 3, 3, "length"),
        (("a", "b"), 3, 2, "stop"),
        (("a", "b", ""), 3, 2, "stop"),
        (("a", "", "b"), 9, 3, "stop"),
        (("a", "b", "c", ""), 3, 3, "length"),
        (("",), 3, 0, "stop"),
    ],
)
def test_tokens_and_the_reason_of_the_end(texts, limit, tokens, reason):
    answer = Answer(limit=limit)
    answer.feed(stream(*texts))
    assert (answer.tokens, answer.reason, answer.begun, answer.rest()) == (tokens, reason, True, "")


def test_a_model_that_says_why_it_ended_is_believed():
    answer = Answer(limit=2)
    answer.feed(event(text_output="a") + event(text_output="b", finish_reason="stop"))
    assert answer.reason == "stop"


def test_an_error_in_the_stream_ends_it():
    answer = Answer(limit=9)
    assert answer.feed(stream("a", "b") + event(error="out of memory") + stream("c")) == ["a", "b"]
    assert (answer.failure, answer.over, answer.tokens) == ("out of memory", True, 2)


@pytest.mark.parametrize("data", [b"[1]", b"{", b'{"x": 1}', b'{"text_output": ["a"]}', b"x" * (1 << 20)])
def test_what_is_no_answer_is_an_error(data):
    with pytest.raises(ValueError, match=r".+"):
        Answer(limit=3).feed(b"data: " + data + b"\n" * (len(data) < 1000) * 2)


def test_nothing_has_begun_without_an_event():
    answer = Answer(limit=3)
    assert answer.feed(b": comment\n\ndata: {") == []
    assert not answer.begun


def named(chat):
    return Named(id='x"1', created=7, model="mé", chat=chat)


def parsed(data):
    assert data.endswith(b"\n\n")
    return [json.loads(line[6:]) for line in data.split(b"\n\n")[:-1] if line != b"data: [DONE]"]


@given(st.text())
def test_chunks_carry_any_text(text):
    (completion,) = parsed(Chunks(named(False)).text(text))
    assert completion == {
        "id": 'x"1',
        "object": "text_completion",
        "created": 7,
        "model": "mé",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}],
    }
    (chat,) = parsed(Chunks(named(True)).text(text))
    assert chat["object"] == "chat.completion.chunk"
    assert chat["choices"] == [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}]


def test_the_first_and_last_chunks():
    assert Chunks(named(False)).role() == b""
    (role,) = parsed(Chunks(named(True)).role())
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    (closed,) = parsed(Chunks(named(True)).closed("stop"))
    assert closed["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    (closed,) = parsed(Chunks(named(False)).closed("stop"))
    assert closed["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    (last,) = parsed(Chunks(named(True)).last("é", "length"))
    assert last["choices"] == [{"index": 0, "delta": {"content": "é"}, "logprobs": None, "finish_reason": "length"}]
    assert Chunks(named(True)).end(None) == DONE
    (usage,) = parsed(Chunks(named(False)).end(Usage(prompt_tokens=3, completion_tokens=4)))
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@given(st.text(), st.booleans())
def test_whole_answers(text, chat):
    found = json.loads(whole(text, "stop", Usage(prompt_tokens=1, completion_tokens=2), named(chat)))
    choice = found["choices"][0]
    assert (choice["message"]["content"] if chat else choice["text"]) == text
    assert found["object"] == ("chat.completion" if chat else "text_completion")
    assert found["usage"]["total_tokens"] == 3
