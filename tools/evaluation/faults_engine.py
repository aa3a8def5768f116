"""Faults of a real vLLM: late, stalled, killed and back, crashed, full, shared."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from tools.engines.vllm_server import MODEL
from tools.evaluation.fault_bench import Bench, Found
from tools.evaluation.fault_client import COMPLETIONS, Answer, tallied
from tools.evaluation.fault_house import House, eventually

CHAT = "/v1/chat/completions"


async def slow_start(bench: Bench) -> list[Found]:
    """The gateway is there half a minute before its engine."""
    async with bench.gateway("limits.engine_wait_s=2", ready=False) as hasty:
        early = await asyncio.gather(*(hasty.client.ask(tokens=8) for _ in range(3)))
        assert all(answer.status == 503 and answer.error for answer in early), tallied(early)
    async with bench.gateway("limits.engine_wait_s=400", ready=False) as house:
        waiting = [asyncio.create_task(house.client.ask(tokens=8, hang_s=420, stream=n % 2 > 0)) for n in range(6)]
        await asyncio.sleep(1.0)
        await bench.engine()
        answers = await asyncio.gather(*waiting)
        assert all(answer.served for answer in answers), tallied(answers)
        left = await house.left(bench.running)
    longest_s = max(answer.seconds for answer in answers)
    told = f"within limits.engine_wait_s: {tallied(answers)} (after up to {longest_s:.0f} s)"
    return [
        Found(
            fault="engine starts after the gateway",
            client=f"{told}; beyond: {tallied(early)}",
            left=left,
        )
    ]


async def stalled(bench: Bench) -> list[Found]:
    """The engine stands still with requests in it, longer than limits.silence_s."""
    await bench.engine()
    async with bench.gateway("limits.silence_s=3") as house:
        short = await _paused(bench, house, seconds=1.2)
        assert all(answer.served for answer in short), tallied(short)
        long = await _paused(bench, house, seconds=8.0)
        for answer in long:
            answer.check()
        codes = {(answer.error or {}).get("code") for answer in long}
        assert codes == {"engine_silent"}, tallied(long)
        left = await house.left(bench.running)
    return [
        Found(
            fault="engine stalled (/pause?mode=keep, then /resume), limits.silence_s = 3",
            client=f"1.2 s: {tallied(short)}; 8 s: {tallied(long)}",
            left=left,
        )
    ]


async def _paused(bench: Bench, house: House, seconds: float) -> list[Answer]:
    """Streams and others that are open while the engine stands still, and some that come meanwhile."""
    asked = [asyncio.create_task(house.client.ask(tokens=700, stream=n % 2 > 0)) for n in range(4)]
    await eventually(lambda: running(bench, 4), 20, "four requests run")
    status, _ = await bench.ask("POST", "/pause?mode=keep")
    assert status == 200
    asked += [asyncio.create_task(house.client.ask(tokens=20, stream=n % 2 > 0)) for n in range(2)]
    await asyncio.sleep(seconds)
    status, _ = await bench.ask("POST", "/resume")
    assert status == 200
    return await asyncio.gather(*asked)


async def running(bench: Bench, count: int) -> bool:
    """Whether the engine holds so many requests."""
    return await bench.running() >= count


async def shared(bench: Bench) -> list[Found]:
    """Two gateways believe that the engine is theirs."""
    await bench.engine()
    async with bench.gateway() as one, bench.gateway() as other:
        asked = [asyncio.create_task(one.client.ask(tokens=1500)) for _ in range(4)]
        mine = asyncio.create_task(other.client.ask(tokens=1500))
        await eventually(lambda: _foreign(other), 30, "/metrics of the second gateway tells of foreign sequences")
        await eventually(lambda: "not ours" in other.log, 30, "the log of the second gateway tells of it")
        answers = await asyncio.gather(*asked, mine)
        assert all(answer.served for answer in answers), tallied(answers)
        left = f"{await one.left(bench.running)}; {await other.left(bench.running)}"
    return [
        Found(
            fault="two gateways on one engine",
            client=f"{tallied(answers)}; said in the log, in throttllem_foreign_sequences and in the engine's notes",
            left=left,
        )
    ]


async def _foreign(house: House) -> bool:
    return (await house.metrics()).get("throttllem_foreign_sequences", 0) >= 1


async def killed(bench: Bench) -> list[Found]:
    """SIGKILL with streams and others in it and more in the queue; then it is started again on the same port."""
    await bench.engine()
    async with bench.gateway("engines.0.max_batch=4", "limits.engine_wait_s=400") as house:
        asked = [asyncio.create_task(house.client.ask(tokens=3000, stream=n % 2 > 0)) for n in range(4)]
        await eventually(lambda: running(bench, 4), 20, "four requests run")
        await asyncio.sleep(0.5)
        queued = [asyncio.create_task(house.client.ask(tokens=8, hang_s=420, stream=n % 2 > 0)) for n in range(4)]
        await eventually(lambda: _queued(house, 4), 20, "four requests wait")
        killed_s = time.monotonic()
        bench.kill_engine()
        lost = await asyncio.gather(*asked)
        told_s = time.monotonic() - killed_s
        for answer in lost:
            answer.check()
        assert not any(answer.served for answer in lost), tallied(lost)
        assert not any(task.done() for task in queued), "who waits goes on waiting"
        await bench.stop()
        await bench.engine()
        answers = await asyncio.gather(*queued)
        assert all(answer.served for answer in answers), tallied(answers)
        left = await house.left(bench.running)
    return [
        Found(
            fault="engine SIGKILLed in mid-stream, started again on the same port",
            client=f"running: {tallied(lost)}, within {told_s:.1f} s; queued: {tallied(answers)} by the new engine",
            left=left,
        )
    ]


async def _queued(house: House, count: int) -> bool:
    return bool((await house.inside())["queue"] >= count)


async def crashed(bench: Bench) -> list[Found]:
    """The engine's worker dies, its API server does not yet: it ends the streams with errors of its own."""
    await bench.engine()
    async with bench.gateway("limits.engine_wait_s=4") as house:
        asked = [asyncio.create_task(house.client.ask(tokens=3000, stream=n % 2 > 0)) for n in range(6)]
        await eventually(lambda: running(bench, 6), 20, "six requests run")
        assert bench.server is not None
        bench.server.kill_workers()
        answers = await asyncio.gather(*asked)
        for answer in answers:
            answer.check()
        assert not any(answer.served for answer in answers), tallied(answers)
        await eventually(lambda: _down(house), 30, "the gateway knows that the engine is gone")
        after = await house.client.ask(tokens=8)
        assert after.status in (502, 503) and after.error, after.said
        await bench.stop()
        await bench.engine()
        await eventually(house.is_up, 30, "the engine is found again")
        left = await house.left(bench.running)
    return [
        Found(
            fault="engine's worker dies in mid-stream, limits.engine_wait_s = 4",
            client=f"{tallied(answers)}; meanwhile: {after.said}",
            left=left,
        )
    ]


async def _down(house: House) -> bool:
    return not await house.is_up()


async def full(bench: Bench) -> list[Found]:
    """Others fill the engine, and it refuses by itself."""
    await bench.engine("--max-num-seqs", "2", "--max-num-queued-reqs", "1")
    async with bench.gateway() as house:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 3500, "ignore_eos": True}
        others = [asyncio.create_task(bench.ask("POST", COMPLETIONS, body)) for _ in range(4)]
        await eventually(partial(running, bench, 1), 30, "others are in the engine")
        answers = [await house.client.ask(tokens=8, stream=n % 2 > 0) for n in range(3)]
        assert any(answer.status == 503 for answer in answers), tallied(answers)
        for answer in answers:
            assert not answer.hung and answer.body, answer.said
        await asyncio.gather(*others)
        left = await house.left(bench.running)
    return [
        Found(
            fault="engine refuses (503 of --max-num-queued-reqs 1)",
            client=f"the engine's own answer as it is: {tallied(answers)}",
            left=left,
        )
    ]


FAULTS = (slow_start, stalled, shared, killed, crashed)
