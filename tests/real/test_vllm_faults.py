"""OpenaiEngine on a real vLLM that dies, or has too little memory. Each test starts one of its own."""

import asyncio

import pytest

from tests.engines.contract import Subject, name_of
from tests.engines.upstreams import call, eventually, whole
from tests.real.vllm import DEADLY, body, engine_of, started, watched
from throttllem.engines.base import EngineError

pytestmark = pytest.mark.real


@pytest.mark.parametrize("check", DEADLY, ids=name_of)
def test_deadly_contract(check, model, tmp_path):
    with started(model, tmp_path) as (there, address):

        async def kill():
            there.kill()

        async def run():
            async with engine_of(there.url, stats=address) as engine:
                await asyncio.wait_for(check(Subject(engine=engine, kill=kill)), 60)

        asyncio.run(run())


def test_a_full_cache_preempts_and_says_so(model, tmp_path):
    flags = ("--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager")
    with started(model, tmp_path, flags=(*flags, "--num-gpu-blocks-override", "24")) as (there, address):

        async def run():
            async with engine_of(there.url, stats=address) as engine, watched(engine) as (told, _):
                spec = (await engine.connect()).spec
                assert (spec.kv_blocks, spec.block_tokens, spec.max_batch) == (23, 128, 8)
                told.clear()
                await asyncio.gather(*(whole(engine, call(body=body(900, prompt="a b c"))) for _ in range(8)))
                await asyncio.sleep(0.2)
                assert max(report.kv_blocks for report in told) >= 22
                assert engine.steps.preemptions > 0
                assert any(report.waiting for report in told)

        asyncio.run(run())


def test_workers_that_die_end_the_streams(model, tmp_path):
    with started(model, tmp_path) as (there, address):

        async def run():
            async with engine_of(there.url, stats=address) as engine, watched(engine) as (told, task):
                answers = [asyncio.create_task(whole(engine, call(body=body(4000)))) for _ in range(3)]
                await eventually(lambda: told[-1].running == 3)
                there.kill_workers()
                # vLLM's API server ends the streams with an error event, or with itself.
                for answer in await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), 30):
                    print(answer if isinstance(answer, EngineError) else answer[1][-300:])
                    assert isinstance(answer, EngineError) or b'"error"' in answer[1]
                with pytest.raises(EngineError):
                    await asyncio.wait_for(task, 30)

        asyncio.run(run())
