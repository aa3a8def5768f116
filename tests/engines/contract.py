"""What every LiveEngine must do, as checks over a running one: `CHECKS`, each an async function of a Subject.

A test file parametrises over them with a factory of its own:

    @pytest.mark.parametrize("check", CHECKS, ids=name_of)
    def test_contract(check):
        async def run():
            async with subject() as it:
                await asyncio.wait_for(check(it), 60)
        asyncio.run(run())
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from throttllem.engines.base import Call, EngineError, LiveEngine
from throttllem.openai_api.requests import CHAT, COMPLETIONS, parse_request

WORDS = "Tell me about the river behind the old mill, and do not stop before the sea."
_JSON = (("content-type", "application/json"),)


@dataclass
class Subject:
    """A running engine and how to end it for good. `chat` False: it has no chat."""

    engine: LiveEngine
    kill: Callable[[], Awaitable[None]]
    chat: bool = True
    next_id: int = field(default=0)

    async def model(self):
        return (await self.engine.connect()).models[0]

    async def call(self, *, chat=False, max_tokens=8, stream=True, **more):
        """A controlled call as the gateway makes it."""
        body = {"model": await self.model(), "max_tokens": max_tokens, "stream": stream, **more}
        body |= {"messages": [{"role": "user", "content": WORDS}]} if chat else {"prompt": WORDS}
        request = parse_request(CHAT if chat else COMPLETIONS, json.dumps(body).encode())
        count = await self.engine.count(request)
        self.next_id += 1
        return Call(
            method="POST",
            path=request.path,
            headers=_JSON,
            body=request.body,
            request_id=self.next_id,
            request=request,
            prompt_tokens=count.tokens,
            max_tokens=max_tokens,
        )

    async def count(self, prompt):
        """Tokens of a completion's prompt."""
        body = {"model": await self.model(), "prompt": prompt}
        return await self.engine.count(parse_request(COMPLETIONS, json.dumps(body).encode()))

    async def whole(self, call):
        """Status and all bytes of a reply."""
        async with self.engine.open(call) as reply:
            return reply.status, await reply.body()


def events_of(data):
    """The JSON of each server-sent event; [DONE] as it is."""
    lines = [line[5:].strip() for line in data.replace(b"\r\n", b"\n").split(b"\n") if line.startswith(b"data:")]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


def text_of(event):
    """The text that one event brings, of a completion or a chat."""
    if event == "[DONE]" or not event.get("choices"):
        return ""
    choice = event["choices"][0]
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


async def connect_returns_a_sane_spec(it):
    connected = await it.engine.connect()
    spec = connected.spec
    assert connected.models and all(connected.models)
    assert min(spec.kv_blocks, spec.block_tokens, spec.max_batch, spec.max_context_tokens, spec.tp) >= 1
    assert list(spec.clocks_mhz) == sorted(set(spec.clocks_mhz)) and spec.clocks_mhz
    assert spec.prefill_budget_tokens >= 1 and spec.idle_w >= 0
    assert connected.default_max_tokens is None or connected.default_max_tokens >= 1
    assert await it.engine.well() is None


async def a_text_is_counted(it):
    short, long = await it.count(WORDS), await it.count(WORDS * 10)
    assert 1 <= short.tokens <= len(WORDS) < long.tokens * 4
    assert 5 * short.tokens < long.tokens <= 11 * short.tokens
    assert short.by


async def token_ids_count_themselves(it):
    count = await it.count(list(range(5, 28)))
    assert (count.tokens, count.exact) == (23, True)


async def a_stream_ends_in_done(it):
    status, data = await it.whole(await it.call(max_tokens=8))
    events = events_of(data)
    assert status == 200
    assert events[-1] == "[DONE]"
    assert 1 <= sum(1 for event in events if text_of(event)) <= 8
    assert [event["choices"][0]["finish_reason"] for event in events[:-1] if event["choices"]][-1] in {"stop", "length"}


async def a_stream_has_the_content_type_of_one(it):
    async with it.engine.open(await it.call(max_tokens=2)) as reply:
        headers = dict(reply.headers)
        assert headers["content-type"].startswith("text/event-stream")
        assert all(name == name.lower() for name in headers)
        assert (await reply.body()).endswith(b"\n\n")


async def usage_comes_if_requested(it):
    call = await it.call(max_tokens=4, stream_options={"include_usage": True})
    events = events_of((await it.whole(call))[1])
    (usage,) = [event["usage"] for event in events[:-1] if event.get("usage") and not event["choices"]]
    assert 1 <= usage["completion_tokens"] <= 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def an_answer_in_one_piece_has_its_usage(it):
    status, data = await it.whole(await it.call(max_tokens=6, stream=False))
    body = json.loads(data)
    assert status == 200
    assert 1 <= body["usage"]["completion_tokens"] <= 6
    assert isinstance(body["choices"][0]["text"], str)


async def a_chat_is_answered(it):
    if not it.chat:
        return
    events = events_of((await it.whole(await it.call(chat=True, max_tokens=6)))[1])
    assert events[-1] == "[DONE]"
    assert 1 <= sum(1 for event in events if text_of(event)) <= 6
    body = json.loads((await it.whole(await it.call(chat=True, max_tokens=6, stream=False)))[1])
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert 1 <= body["usage"]["completion_tokens"] <= 6


async def two_at_once_are_served(it):
    calls = [await it.call(max_tokens=12) for _ in range(2)]
    for status, data in await asyncio.gather(*map(it.whole, calls)):
        assert status == 200
        assert events_of(data)[-1] == "[DONE]"


async def leaving_early_frees_the_engine(it):
    reports = []
    watching = asyncio.ensure_future(it.engine.watch(reports.append))
    try:
        for _ in range(3):
            async with it.engine.open(await it.call(max_tokens=1000, ignore_eos=True)) as reply:
                await reply.read()
        status, _ = await it.whole(await it.call(max_tokens=2))
        assert status == 200
        await asyncio.sleep(0)
        for _ in range(1000):
            if not reports or reports[-1].running == 0:
                break
            await asyncio.sleep(0.01)
        assert not reports or (reports[-1].running, reports[-1].waiting) == (0, 0)
    finally:
        await ended(watching)


async def an_unknown_path_is_answered(it):
    status, _ = await it.whole(Call(method="GET", path="/v1/no-such-thing", headers=(), body=b""))
    assert 400 <= status < 500


async def a_malformed_body_is_answered(it):
    model = await it.model()
    for body in (b"{", b"[]", b'{"model": 5}', json.dumps({"model": model, "prompt": {"a": 1}}).encode()):
        for path in ("/v1/completions", "/v1/chat/completions"):
            status, data = await it.whole(Call(method="POST", path=path, headers=_JSON, body=body))
            assert 400 <= status < 500, (path, body, data)


async def reports_come_while_something_runs(it):
    reports, reported = [], asyncio.Event()
    watching = asyncio.ensure_future(it.engine.watch(lambda report: (reports.append(report), reported.set())))
    connected = await it.engine.connect()
    await it.whole(await it.call(max_tokens=20))
    if connected.exact:
        await asyncio.wait_for(reported.wait(), 5)
        assert all(report.step is not None for report in reports if report.started is not None)
        assert any(report.step is not None for report in reports)
    if connected.named:
        assert reports and all(report.started is not None and report.finished is not None for report in reports)
    assert not watching.done()
    assert all(report.running >= 0 and report.waiting >= 0 for report in reports)
    await ended(watching)


async def a_dead_engine_fails_every_call(it):
    call = await it.call()
    watching = asyncio.ensure_future(it.engine.watch(lambda report: None))
    await asyncio.sleep(0)
    await it.kill()
    with pytest.raises(EngineError) as refused:
        await it.whole(call)
    assert refused.value.status == 502
    with pytest.raises(EngineError):
        await it.engine.connect()
    with pytest.raises(EngineError):
        await it.engine.well()
    with pytest.raises(EngineError):
        await asyncio.wait_for(watching, 30)


async def a_dying_engine_breaks_its_streams_off(it):
    with pytest.raises(EngineError):
        async with it.engine.open(await it.call(max_tokens=1000, ignore_eos=True)) as reply:
            await reply.read()
            await it.kill()
            while True:
                assert await asyncio.wait_for(reply.read(), 30), "the stream must break off, not end"


async def ended(task):
    """Cancel a task that must not have failed, and see it end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


CHECKS = (
    connect_returns_a_sane_spec,
    a_text_is_counted,
    token_ids_count_themselves,
    a_stream_ends_in_done,
    a_stream_has_the_content_type_of_one,
    usage_comes_if_requested,
    an_answer_in_one_piece_has_its_usage,
    a_chat_is_answered,
    two_at_once_are_served,
    leaving_early_frees_the_engine,
    an_unknown_path_is_answered,
    a_malformed_body_is_answered,
    reports_come_while_something_runs,
    a_dead_engine_fails_every_call,
    a_dying_engine_breaks_its_streams_off,
)
"""The last two end the engine."""


def name_of(check):
    """What a test is called."""
    return check.__name__
