"""Synthetic requests and their streams: known lengths, nothing shared, events cut anywhere."""

import asyncio
import contextlib
import json
from itertools import pairwise

import pytest
from engines.live import call, engine
from hypothesis import given
from hypothesis import strategies as st

from throttllem.engines.base import EngineError, PromptCount
from throttllem.profiling.live.load import Prompts, Stream


class Picky:
    """An engine that refuses bodies by `refuses(body)` and counts words as two tokens each."""

    def __init__(self, refuses):
        self.refuses = refuses
        self.inner = engine(seconds=0)

    async def count(self, ask):
        return PromptCount(tokens=2 * len(ask.prompts[0].split()), by="its words", exact=False)

    @contextlib.asynccontextmanager
    async def open(self, one):
        path = "/v1/unknown" if self.refuses(json.loads(one.body)) else one.path
        async with self.inner.open(call(path, raw=one.body)) as reply:
            yield reply


def begun(refuses, *tokens):
    async def run():
        prompts = Prompts(Picky(refuses), "toy")
        await prompts.begin()
        return prompts, [await prompts.call(count, 3) for count in tokens]

    return asyncio.run(run())


def test_token_ids_of_exactly_the_length_with_nothing_in_common():
    prompts, calls = begun(lambda body: False, *[40] * 20)
    bodies = [json.loads(one.body) for one in calls]
    assert {len(body["prompt"]) for body in bodies} == {40}
    assert {one.prompt_tokens for one in calls} == {40}
    assert len({tuple(body["prompt"][:16]) for body in bodies}) == 20
    assert all(body["ignore_eos"] and body["stream"] and body["max_tokens"] == 3 for body in bodies)
    assert prompts.notes == ()
    again = json.loads(begun(lambda body: False, 40)[1][0].body)["prompt"]
    # What an earlier run sent may still be in the engine's cache.
    assert again[:16] not in [body["prompt"][:16] for body in bodies]


def test_words_where_ids_are_refused():
    prompts, calls = begun(lambda body: not isinstance(body["prompt"], str), 40, 40, 3)
    texts = [json.loads(one.body)["prompt"] for one in calls]
    assert [one.prompt_tokens for one in calls] == [40, 40, 2]
    assert [len(text.split()) for text in texts] == [20, 20, 1]
    assert texts[0] != texts[1]
    assert "no token ids: prompts are words, counted by its words, which is an estimate" in prompts.notes[0]


def test_without_ignore_eos_there_is_a_note():
    prompts, calls = begun(lambda body: "ignore_eos" in body, 4)
    assert "ignore_eos" not in json.loads(calls[0].body)
    assert "outputs may end early" in prompts.notes[0]


def test_an_engine_that_refuses_everything():
    with pytest.raises(EngineError, match="refuses every synthetic request, the last with 404"):
        begun(lambda body: True)


EVENTS = (
    b'data: {"choices":[{"text":"a"}]}\r\n\r\n'
    b": a comment\n\n"
    b'data: {"choices":[{"text":"data: {\\"x"}]}\n\n'
    b'data: {"choices":[{"text":"bcd"}],"usage":{"completion_tokens":5}}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens": 5}}\n\ndata: [DONE]\n\n'
)


@given(st.lists(st.integers(0, len(EVENTS)), max_size=12))
def test_tokens_are_counted_wherever_events_are_cut(cuts):
    stream, edges = Stream(prompt_tokens=1), [0, *sorted(cuts), len(EVENTS)]
    for number, (begin, end) in enumerate(pairwise(edges)):
        stream.read(EVENTS[begin:end], float(number))
    assert stream.length == 5
    assert set(stream.tokens) <= {1, 2, 5}
    assert stream.tokens == sorted(set(stream.tokens))
