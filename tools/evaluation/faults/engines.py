"""Faults of the engine: late, stalled, killed and back, crashed, full, shared."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from tools.evaluation.faults.bed import Bed, Found
from tools.testbed.client import COMPLETIONS, Answer, tallied
from tools.testbed.inspected_gateway import Inspected, eventually

LATE_S = 420.0
"""A real engine may take minutes to start."""


async def slow_start(bed: Bed) -> list[Found]:
    """The gateway runs before its engine."""
    await bed.stop()
    async with bed.gateway("limits.engine_wait_s=2", ready=False) as hasty:
        early = await asyncio.gather(*(hasty.client.ask(tokens=8) for _ in range(3)))
        assert all(answer.status == 503 and answer.error for answer in early), tallied(early)
    async with bed.gateway("limits.engine_wait_s=400", ready=False) as gateway:
        waiting = _asked(gateway, 6, tokens=8, hang_s=LATE_S)
        await asyncio.sleep(1.0)
        await bed.engine()
        answers = await asyncio.gather(*waiting)
        assert all(answer.served for answer in answers), tallied(answers)
        left = await gateway.left(bed.running)
    longest_s = max(answer.seconds for answer in answers)
    patient = f"within limits.engine_wait_s: {tallied(answers)} (after up to {longest_s:.0f} s)"
    return [Found(fault="engine starts after the gateway", client=f"{patient}; beyond: {tallied(early)}", left=left)]


async def stalled(bed: Bed) -> list[Found]:
    """The engine stands still with requests in it, longer than limits.silence_s."""
    await bed.engine()
    async with bed.gateway("limits.silence_s=3") as gateway:
        short = await _paused(bed, gateway, seconds=1.2)
        assert all(answer.served for answer in short), tallied(short)
        long = await _paused(bed, gateway, seconds=8.0)
        for answer in long:
            answer.check()
        codes = {(answer.error or {}).get("code") for answer in long}
        assert codes == {"engine_silent"}, tallied(long)
        left = await gateway.left(bed.running)
    return [
        Found(
            fault="engine stands still for a while, limits.silence_s = 3",
            client=f"1.2 s: {tallied(short)}; 8 s: {tallied(long)}",
            left=left,
        )
    ]


async def _paused(bed: Bed, gateway: Inspected, seconds: float) -> list[Answer]:
    """Answers that are under way when the engine stops, and some asked for meanwhile."""
    asked = _asked(gateway, 4, tokens=700)
    await eventually(partial(bed.runs, 4), 20, "four requests run")
    await bed.kind.pause(bed, True)
    asked += _asked(gateway, 2, tokens=20)
    await asyncio.sleep(seconds)
    await bed.kind.pause(bed, False)
    return await asyncio.gather(*asked)


async def shared(bed: Bed) -> list[Found]:
    """Two gateways on one engine."""
    await bed.engine()
    async with bed.gateway() as one, bed.gateway() as other:
        asked = [*_asked(one, 4, tokens=1500), *_asked(other, 1, tokens=1500)]
        await eventually(partial(_external, other), 30, "/metrics of the second gateway counts the others' sequences")
        answers = await asyncio.gather(*asked)
        assert all(answer.served for answer in answers), tallied(answers)
        left = f"{await one.left(bed.running)}; {await other.left(bed.running)}"
    return [
        Found(
            fault="two gateways on one engine",
            client=f"{tallied(answers)}; shown in /metrics as sequences of other clients",
            left=left,
        )
    ]


async def _external(gateway: Inspected) -> bool:
    return (await gateway.metrics()).get("throttllem_external_sequences", 0.0) >= 1


async def killed(bed: Bed) -> list[Found]:
    """SIGKILL with requests in it and more in the queue; then it is started again on the same port."""
    await bed.engine()
    async with bed.gateway("engines.0.max_batch=4", "limits.engine_wait_s=400") as gateway:
        asked = [asyncio.create_task(gateway.client.ask(stream=True, tokens=3000)) for _ in range(3)]
        without_a_byte = asyncio.create_task(gateway.client.ask(stream=False, tokens=700, hang_s=LATE_S))
        await eventually(partial(bed.runs, 4), 20, "four requests run")
        await asyncio.sleep(0.5)
        queued = _asked(gateway, 4, tokens=8, hang_s=LATE_S)
        await eventually(partial(gateway.queued, 4), 20, "four requests wait")
        killed_s = time.monotonic()
        bed.kill_engine()
        lost = await asyncio.gather(*asked)
        lost_s = time.monotonic() - killed_s
        for answer in lost:
            answer.check()
        assert not any(answer.served for answer in lost), tallied(lost)
        assert not any(task.done() for task in queued), "queued requests go on waiting"
        assert not without_a_byte.done(), "one that is not streamed is tried once more"
        await bed.stop()
        await bed.engine()
        answers = await asyncio.gather(*queued)
        assert all(answer.served for answer in answers), tallied(answers)
        again = await without_a_byte
        assert again.served, again.outcome
        left = await gateway.left(bed.running)
    return [
        Found(
            fault="engine SIGKILLed in mid-stream, started again on the same port",
            client=f"running: {tallied(lost)}, within {lost_s:.1f} s; without a byte sent: {again.outcome}, and "
            f"queued: {tallied(answers)} by the new engine",
            left=left,
        )
    ]


async def crashed(bed: Bed) -> list[Found]:
    """The engine's worker dies, its API server does not yet: it ends the streams with its own errors."""
    await bed.engine()
    async with bed.gateway("limits.engine_wait_s=4") as gateway:
        asked = _asked(gateway, 6, tokens=3000)
        await eventually(partial(bed.runs, 6), 20, "six requests run")
        assert bed.process is not None
        if not bed.kind.crash_workers(bed.process):
            bed.kill_engine()
        answers = await asyncio.gather(*asked)
        for answer in answers:
            answer.check()
        assert not any(answer.served for answer in answers), tallied(answers)
        await eventually(partial(_down, gateway), 30, "the gateway notices that the engine is gone")
        after = await gateway.client.ask(tokens=8)
        assert after.status in (502, 503) and after.error, after.outcome
        await bed.stop()
        await bed.engine()
        await eventually(gateway.is_up, 30, "the engine is found again")
        left = await gateway.left(bed.running)
    return [
        Found(
            fault="engine's worker dies in mid-stream, limits.engine_wait_s = 4",
            client=f"{tallied(answers)}; meanwhile: {after.outcome}",
            left=left,
        )
    ]


async def _down(gateway: Inspected) -> bool:
    return not await gateway.is_up()


async def full(bed: Bed) -> list[Found]:
    """Other clients fill the engine, and it refuses requests itself."""
    await bed.engine(full=True)
    async with bed.gateway() as gateway:
        body = {"model": bed.kind.model, "prompt": "x", "max_tokens": 3500, "ignore_eos": True}
        others = [asyncio.create_task(bed.ask("POST", COMPLETIONS, body)) for _ in range(4)]
        await eventually(partial(bed.runs, 1), 30, "requests of other clients are in the engine")
        answers = [await gateway.client.ask(tokens=8, stream=number % 2 > 0) for number in range(3)]
        assert any(answer.status == 503 for answer in answers), tallied(answers)
        for answer in answers:
            assert not answer.hung and answer.body, answer.outcome
        await asyncio.gather(*others)
        left = await gateway.left(bed.running)
    return [
        Found(
            fault="engine refuses (503)",
            client=f"the engine's own answer as it is: {tallied(answers)}",
            left=left,
        )
    ]


def _asked(gateway: Inspected, count: int, **fields: object) -> list[asyncio.Task[Answer]]:
    """Requests under way, every other one streamed."""
    return [asyncio.create_task(gateway.client.ask(stream=number % 2 > 0, **fields)) for number in range(count)]  # type: ignore[arg-type]


FAULTS = (slow_start, stalled, shared, killed, crashed, full)
