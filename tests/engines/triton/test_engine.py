import asyncio

import pytest

from engines.triton_peer import PAGE, SPEC, answer, call, triton
from throttllem.engines.base import EngineError
from throttllem.openai_api.requests import CHAT, COMPLETIONS, Api, ParsedRequest


def test_connect_reads_the_model():
    async def run():
        async with triton(measured=True, max_context_tokens=4096) as (_, engine):
            return await engine.connect()

    connected = asyncio.run(run())
    assert connected.models == ("ensemble",)
    assert (connected.version, connected.default_max_tokens, connected.exact) == ("Triton 2.51.0", 16, False)
    spec = connected.spec
    assert (spec.kv_blocks, spec.block_tokens, spec.max_batch) == (6239, 32, 512)
    assert (spec.max_context_tokens, spec.no_evict, spec.clocks_mhz) == (4096, True, SPEC.clocks_mhz)
    assert len(connected.notes) == 2  # template, tokenizer


@pytest.mark.parametrize("early", [b"", PAGE.replace(b" 6239", b" 0")])
def test_connect_waits_for_the_first_numbers_of_a_model_that_is_ready(early):
    async def run():
        async with triton(measured=True) as (peer, engine):
            peer.early_pages = [early]
            return await engine.connect()

    assert asyncio.run(run()).spec.kv_blocks == 6239


def test_connect_without_configuration_or_metrics_notes_what_it_assumes():
    async def run():
        async with triton() as (peer, engine):
            peer.config = None
            return await engine.connect()

    connected = asyncio.run(run())
    assert connected.spec == SPEC
    notes = " ".join(connected.notes)
    for word in (
        "kv_blocks",
        "max_batch",
        "max_context_tokens",
        "inputs are assumed",
        "metrics",
        "tokenizer",
        "plainly",
    ):
        assert word in notes


def test_a_model_that_is_not_ready_is_an_error():
    async def run():
        async with triton() as (peer, engine):
            peer.ready = 400
            await engine.connect()

    with pytest.raises(EngineError, match="not ready") as caught:
        asyncio.run(run())
    assert caught.value.status == 503


def test_a_chat_template_that_cannot_be_used_is_an_error(tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed").Tokenizer(
        __import__("tokenizers").models.WordLevel({"a": 0}, unk_token="a")
    ).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")

    async def run():
        async with triton(tokenizer=tmp_path / "tokenizer.json") as (_, engine):
            await engine.connect()

    with pytest.raises(EngineError, match=r"tokenizer_config\.json"):
        asyncio.run(run())


def test_native_calls_pass_unchanged():
    async def run():
        async with triton() as (peer, engine):
            sent = b'{"text_input" : "hi","max_tokens":3}'
            got = await answer(engine, "/v2/models/ensemble/generate_stream", sent)
            other = await answer(engine, "/v2/no/such/path", b"")
            return got, other, b"".join(peer.script), peer.asked[0][2], sent

    (status, data), other, script, arrived, sent = asyncio.run(run())
    assert (status, data, arrived) == (200, script, sent)
    assert other == (404, b'{"error": "Not Found"}')


def test_prompts_are_counted():
    async def run():
        async with triton() as (_, engine):

            def completion(*prompts):
                request = ParsedRequest(
                    api=Api.COMPLETIONS, path=COMPLETIONS, model="", fields={}, body=b"", prompts=prompts
                )
                return engine.count(request)

            def chat(**fields):
                return engine.count(
                    ParsedRequest(api=Api.CHAT, path=CHAT, model="", fields=fields, body=b"", chat=fields)
                )

            return [
                await completion("x" * 40),
                await completion("x" * 40, (1, 2)),
                await chat(messages=[{"role": "user", "content": "hi"}]),
                await completion((1, 2)),
            ], await chat()

    counts, broken = asyncio.run(run())
    assert [count.tokens for count in counts] == [10, 6, 5, 2]
    assert [count.exact for count in counts] == [False, False, False, True]
    assert "4 bytes" in counts[0].by
    assert broken.tokens == 1  # `open` answers it with an error


def test_watch_reports_tritons_metrics_and_ends_after_three_failures():
    async def run():
        async with triton(measured=True) as (peer, engine):
            reports = []

            def take(report):
                reports.append(report)
                peer.ready = 400

            with pytest.raises(EngineError, match="not ready"):
                await engine.watch(take)
            return reports

    reports = asyncio.run(run())
    assert [(report.running, report.waiting, report.kv_blocks, report.step) for report in reports] == [(3, 2, 17, None)]


def test_an_engine_that_is_not_there():
    async def run():
        async with triton() as (_, engine):
            pass
        try:
            async with engine.open(call(COMPLETIONS, {"prompt": "hi"})):
                pass
        finally:
            await engine.close()

    with pytest.raises(EngineError) as caught:
        asyncio.run(run())
    assert caught.value.status == 502
