"""Tens of thousands of short requests through one gateway: does anything grow?

The engine is a small one that fails one request in 25. One client in ten hangs up, one request in 40 is malformed, half
are streams, and callers come and go.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tools.testbed.client import COMPLETIONS, Client, connection, head
from tools.testbed.engines.openai_engine import MODEL, openai_engine
from tools.testbed.inspected_gateway import QUIET_S, Inspected, inspected_gateway
from tools.testbed.processes import post

PACE = {"step_s": 0.002, "first_s": 0.002, "together": True, "fail_every": 50}
CLIENTS = 48
SAMPLES = 100
WARM = 0.5
"""The fraction of the run that fills caches and pools; what is learned of callers stays, up to a bound."""
CALLERS = 3000
"""More than the length predictor remembers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endured:
    """`samples` over the run, each what the gateway held after `done` requests; `answers` counts what clients saw.

    `left`: the Python objects that a garbage collection left, early and at the end.
    """

    requests: int
    seconds: float
    samples: tuple[dict[str, Any], ...]
    answers: dict[str, int]
    left: tuple[int, ...]

    def decile(self, name: str, which: int) -> float:
        """The median of a figure over the first (0) or the last (-1) tenth of the run after its warm-up."""
        warm = [float(sample[name]) for sample in self.warm()]
        tenth = max(1, len(warm) // 10)
        part = warm[:tenth] if which == 0 else warm[-tenth:]
        return median(part)

    def slope(self, name: str) -> float:
        """How a figure grows by request, after the warm-up (least squares)."""
        points = [(float(sample["done"]), float(sample[name])) for sample in self.warm()]
        mean_x, mean_y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread

    def warm(self) -> Sequence[dict[str, Any]]:
        """The samples after the warm-up."""
        return self.samples[int(len(self.samples) * WARM) :]


async def endure(folder: Path, requests: int, report: Callable[[str], None] = lambda _: None) -> Endured:
    """Send this number of requests after a warm-up of as many, and sample what the gateway holds meanwhile.

    At the end it must hold nothing.
    """
    requests = round(requests / (1 - WARM))
    folder.mkdir(exist_ok=True)
    settings = ("--set", "recorder.file_bytes=1048576", "--set", "limits.silence_s=20")
    with openai_engine(folder / "engine.log") as (url, _):
        post(f"{url}/pace", PACE | {"fail_every": 0})
        async with inspected_gateway(folder, "--engine", url, *settings, model=MODEL) as gateway:
            await gateway.ready()
            post(f"{url}/pace", PACE)
            async with Client(gateway.url, MODEL, keep=True) as client:  # its end closes its connections
                endured = await _endured(gateway, client, requests, report)
            post(f"{url}/pace", PACE | {"fail_every": 0})
            await gateway.left()
    return endured


async def _endured(gateway: Inspected, client: Client, requests: int, report: Callable[[str], None]) -> Endured:
    began_s = time.monotonic()
    samples: list[dict[str, Any]] = []
    answers: Counter[str] = Counter()
    left: list[int] = []

    async def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            answers[await _one(client, number)] += 1
            if number % (requests // SAMPLES) == 0:
                samples.append({"done": number, **await gateway.inside()})
                report(f"{number} requests after {time.monotonic() - began_s:.0f} s: {_figures(samples[-1])}")

    for part in (range(int(requests * WARM)), range(int(requests * WARM), requests)):
        numbers = iter(part)
        await asyncio.gather(*(work(numbers) for _ in range(CLIENTS)))
        await asyncio.sleep(QUIET_S)
        left.append((await gateway.inside())["objects"])
    assert answers.total() == requests
    return Endured(
        requests=requests,
        seconds=time.monotonic() - began_s,
        samples=tuple(samples),
        answers=dict(answers),
        left=tuple(left),
    )


def _figures(sample: dict[str, Any]) -> str:
    held = f"{sample['tasks']} tasks, {sample['descriptors']} descriptors, {sample['objects']} objects"
    return f"{sample['resident_bytes'] / 2**20:.1f} MiB, {held}"


async def _one(client: Client, number: int) -> str:
    """One request; what became of it."""
    dice = random.Random(number)
    stream, tokens = dice.random() < 0.5, dice.randint(1, 8)
    fields = client.fields(tokens=tokens, stream=stream, user=f"caller {dice.randrange(CALLERS)}")
    fields["prompt"] = "word " * dice.randint(1, 60)
    body = json.dumps(fields).encode()
    lot = dice.random()
    if lot < 0.1:
        await _hang_up(client.url, body, begun=lot < 0.05, wait_s=lot / 20)
        return "hung up"
    if lot < 0.125:
        body = body[:-1]
    headers = {"x-slo-e2e-ms": "2000", "x-slo-tpot-ms": "100"} if dice.random() < 0.5 else None
    answer = await client.send(body, headers=headers)
    answer.check()
    return answer.outcome


async def _hang_up(url: str, body: bytes, *, begun: bool, wait_s: float) -> None:
    """Leave when the answer has begun, or before."""
    async with connection(url) as (reader, writer):
        writer.write(head(len(body), path=COMPLETIONS) + body)
        if begun:
            await asyncio.wait_for(reader.read(1), 30)
        else:
            await asyncio.sleep(wait_s)
