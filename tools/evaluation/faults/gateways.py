"""Faults of the gateway and of what it stands on: killed, stopped under load, no port, no disk, no clock."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from throttllem.gateway.flight.replay import replay
from throttllem.profiling.lengths import load_lengths
from tools.evaluation.faults.bed import Bed, Found
from tools.nvml.machine import Machine, a100
from tools.testbed.client import Answer, tallied
from tools.testbed.gateway import THROTTLLEM
from tools.testbed.inspected_gateway import eventually

SAVED_S = 45.0
"""What was learned is saved every 30 s."""


async def killed(bed: Bed) -> list[Found]:
    """SIGKILL under load, and a new one on the same port with the same folder."""
    await bed.engine()
    async with bed.gateway("recorder.file_bytes=65536") as gateway:
        taught = await asyncio.gather(*(gateway.client.ask(tokens=30) for _ in range(40)))
        assert all(answer.served for answer in taught), tallied(taught)
        state = gateway.folder / "state"
        await eventually(lambda: _seen(state) >= 40, SAVED_S, "what was learned is saved")
        asked = [asyncio.create_task(gateway.client.ask(tokens=3000, stream=n % 2 > 0)) for n in range(4)]
        await eventually(partial(bed.runs, 4), 20, "four requests run")
        await asyncio.sleep(1.0)  # the recorder writes twice a second
        gateway.kill(signal.SIGKILL)
        killed_s = time.monotonic()
        answers = await asyncio.gather(*asked)
        await eventually(partial(_empty, bed), 20, "the engine lets go of them")
        aborted_s = time.monotonic() - killed_s
        port = int(gateway.url.rpartition(":")[2])
        learned = _seen(state)
        async with bed.gateway(folder=gateway.folder, port=port) as again:
            left = await again.left(bed.running)
            assert "damaged" not in again.log and "cannot be read" not in again.log
            assert await again.stopped(20) == 0
        assert _seen(state) > learned, "learning goes on where it ended"
        records = _replayed(state / "flight")
    return [
        Found(
            fault="gateway SIGKILLed under load, started again on the same port and folder",
            client=f"{tallied(answers)} (its connections are gone); afterwards served",
            left=f"engine empty after {aborted_s:.1f} s; {learned} learned lengths survive; {records}; {left}",
        )
    ]


def _seen(state: Path) -> int:
    """Answers that were learned from, of the engine's model."""
    groups = [
        group for file in state.glob("lengths-*.json") for group in load_lengths(file).predictor.state()["groups"]
    ]
    return max((int(group["answers"]) for group in groups), default=0)


async def _empty(bed: Bed) -> bool:
    return await bed.running() == 0


def _replayed(folder: Path) -> str:
    """Every flight record in a folder gives the same commands again."""
    files = sorted(folder.glob("*.jsonl"))
    assert len(files) >= 2, f"records of both lives: {files}"
    results = [replay(file) for file in files]
    for result in results:
        assert result.first_difference is None, f"{result.file}: {result.first_difference}"
    events = sum(sum(result.events.values()) for result in results)
    return f"{len(files)} flight records ({events:,} events) replay the same"


async def drained(bed: Bed) -> list[Found]:
    """SIGTERM under load: time enough, too little, and a second signal."""
    await bed.engine()
    async with bed.gateway("engines.0.max_batch=4", "limits.drain_s=60") as gateway:
        asked = [asyncio.create_task(gateway.client.ask(tokens=1500, stream=n % 2 > 0)) for n in range(8)]
        await eventually(partial(bed.runs, 4), 20, "four requests run")
        gateway.kill(signal.SIGTERM)
        await eventually(lambda: "stopping" in gateway.log, 5, "it logs that it stops")
        late = await gateway.client.ask(tokens=5)
        assert late.status == 503 and late.error and late.error["code"] == "draining", late.outcome
        patient = await asyncio.gather(*asked)
        assert all(answer.served for answer in patient), tallied(patient)
        assert await gateway.ended(10) == 0
    cut, cut_s = await _cut(bed, "limits.drain_s=2", signals=1, within_s=8)
    hurried, hurried_s = await _cut(bed, "limits.drain_s=60", signals=2, within_s=6)
    await eventually(partial(_empty, bed), 20, "the engine is empty")
    return [
        Found(
            fault="SIGTERM under load (4 running, 4 queued)",
            client=(
                f"limits.drain_s = 60: {tallied(patient)}; new ones: {late.outcome}; "
                f"limits.drain_s = 2: {tallied(cut)}, over after {cut_s:.1f} s; "
                f"second signal: {tallied(hurried)}, over after {hurried_s:.1f} s"
            ),
            left="exit code 0 each time; the engine is empty",
        )
    ]


async def _cut(bed: Bed, setting: str, *, signals: int, within_s: float) -> tuple[list[Answer], float]:
    """Requests that are too long for the time that is left."""
    async with bed.gateway("engines.0.max_batch=4", setting) as gateway:
        asked = [asyncio.create_task(gateway.client.ask(tokens=4000, stream=n % 2 > 0)) for n in range(8)]
        await eventually(partial(bed.runs, 4), 20, "four requests run")
        await asyncio.sleep(0.5)
        began = time.monotonic()
        for _ in range(signals):
            gateway.kill(signal.SIGTERM)
            await asyncio.sleep(0.3)
        code = await gateway.ended(within_s)
        took_s = time.monotonic() - began
        answers = await asyncio.gather(*asked)
        assert code == 0, f"exit code {code}: {gateway.log[-1500:]}"
        for answer in answers:
            answer.check()
        return answers, took_s


async def no_port(bed: Bed) -> list[Found]:
    """Another has the port."""
    async with bed.simulated("policy=triton") as gateway:
        port = gateway.url.rpartition(":")[2]
        command = [str(THROTTLLEM), "serve", "--port", port, "--set", f"state_dir={bed.folder / 'other'}"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and f"server.port = {port}" in done.stderr, done
        assert "Traceback" not in done.stderr, done.stderr
        left = await gateway.left()
    error = " ".join(done.stderr.split())
    return [Found(fault="port taken", client=f"exit code 2: `{error.replace(port, '8000')}`", left=left)]


async def no_disk(bed: Bed) -> list[Found]:
    """Files cannot grow any more (RLIMIT_FSIZE, as a full disk does it) under recorder and lengths."""
    async with bed.simulated("policy=triton") as gateway:
        limits = resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        answers = await asyncio.gather(*(gateway.client.ask(tokens=40, stream=n % 2 > 0) for n in range(20)))
        await eventually(lambda: "flight recorder" in gateway.log, 20, "the log reports that recording stopped")
        answers += await asyncio.gather(*(gateway.client.ask(tokens=40) for n in range(20)))
        assert all(answer.served for answer in answers), tallied(answers)
        assert gateway.log.count("flight recorder") == 1, "logged once"
        left = await gateway.left()
        assert await gateway.stopped(20) == 0
    return [
        Found(
            fault="disk full under recorder and learned lengths",
            client=f"{tallied(answers)}; logged once: the flight recorder stopped, and tries again every 60 s",
            left=left,
        )
    ]


async def no_clock(bed: Bed) -> list[Found]:
    """The GPU is lost: its clock can be neither set nor read."""
    await bed.engine()
    (part,) = a100()
    with Machine.create(bed.folder / "gpus", [part]) as machine:
        options = ("clocks.mode=on", f"engines.0.gpus={part.uuid}", f"clocks.keeper={bed.folder / 'keeper.sock'}")
        async with bed.gateway(*options, environment=machine.environment()) as gateway:
            machine.gpus[0].lost(True)
            answers = await asyncio.gather(*(gateway.client.ask(tokens=60, stream=n % 2 > 0) for n in range(20)))
            assert all(answer.served for answer in answers), tallied(answers)
            metrics = await gateway.metrics()
            assert metrics["throttllem_planned_clock_hertz"] == metrics["throttllem_top_clock_hertz"], metrics
            machine.gpus[0].lost(False)
            left = await gateway.left(bed.running)
            assert not machine.writes()
    return [
        Found(
            fault="no keeper, and the GPU is lost: its clock can be neither set nor read",
            client=f"{tallied(answers)}; planned: the maximum clock",
            left=left,
        )
    ]


ON_ENGINE = (killed, drained, no_clock)
ALONE = (no_port, no_disk)
