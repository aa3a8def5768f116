"""The gateway's process: real loop, backend, GPUs through NVML and lease from the keeper; requests come by a socket.

What HTTP does in front of a real one is left out. Clocks are set far more often than any policy would.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from throttllem.config import LimitOptions
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller
from throttllem.core.options import ControllerOptions
from throttllem.core.types import FrequencyPlan, Reason, Slo
from throttllem.engines.base import Call, EngineError
from throttllem.engines.simulated import realtime, replies
from throttllem.engines.simulated.text import Tape
from throttllem.gateway.control import clock_setter as engine_clock
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.control.models import Models, ServedModel
from throttllem.gateway.control.session import Session
from throttllem.gateway.energy.accounting import EnergyAccounting
from throttllem.gpu import hardware
from throttllem.gpu.setters import clock_setter
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.requests import COMPLETIONS, parse_request
from tools.soak.small_engine import MODEL, SmallEngine, small_spec

AGAIN_S = 0.12
"""In place of the second for which gateways wait after a failed set: a schedule lasts no longer."""
CHILD_LIVES_S = 15.0
_TAPE = Tape(0, sentences=50)
"""All gateways say the same: making it, and looking for our version, takes longer than all the rest of their start."""


def run(told: dict[str, Any]) -> None:
    """Serve until SIGTERM. `told`: as `house` says; requests and faults come over "control", their ends go back."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(levelname)s %(message)s")
    hardware.RETRY_S = engine_clock._RETRY_S = AGAIN_S
    vars(replies)["Tape"] = lambda _: _TAPE
    vars(realtime)["version"] = lambda _: "soaked"
    uvloop.run(_live(told))


class _Nobody:
    """Nothing is recorded."""

    def handled(self, *_: object) -> None:
        """An event."""

    def ended(self, *_: object) -> None:
        """A request."""


async def _live(told: dict[str, Any]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    control: socket.socket = told["control"]
    reader, writer = await asyncio.open_connection(sock=control)
    clocks = tuple(told["clocks_mhz"])
    gpu = hardware.HardwareGpu(
        tuple(told["gpus"]),
        mode=hardware.Mode.ON,
        setter=clock_setter(keeper=Path(told["socket"]), ttl_s=told["ttl_s"]),
        clocks_mhz=clocks,
    )
    async with gpu:
        backend = _link(told, gpu, clocks)
        models = _models(backend)
        await models.start()
        house = _House(models=models, backend=backend, writer=writer)
        working = [asyncio.create_task(work) for work in (house.obey(reader), _clocks(backend, clocks, told))]
        await stop.wait()
        models.draining = True
        await models.stop()
        for task in working:
            task.cancel()
        await asyncio.gather(*working, *house.asking, return_exceptions=True)
    await writer.drain()


def _link(told: dict[str, Any], gpu: hardware.HardwareGpu, clocks: tuple[int, ...]) -> Backend:
    spec = small_spec(clocks, len(told["gpus"]))
    engine = SmallEngine(spec, Path(told["library"]), told["indices"][0], told["seed"], not told["engine_there"])
    accounting = EnergyAccounting(gpu=gpu, now=time.monotonic, kv_blocks=lambda: 1)
    return Backend(
        name="small",
        kind="simulated",
        tp=spec.tp,
        catalogue_gpu="fake",
        catalogue_model=MODEL,
        engine=engine,
        clock=engine_clock.ClockSetter(
            name="small", gpu=gpu, reading=accounting.reading, now=time.monotonic, mode="on"
        ),
        accounting=accounting,
        now=time.monotonic,
    )


def _models(backend: Backend) -> Models:
    options = ControllerOptions(throttle=ThrottleOptions(policy=ClockPolicy.TOP), slo_aware=False)
    loop = ControlLoop(
        controller=Controller(options),
        backends=(backend,),
        limits=LimitOptions(engine_wait_s=4.0, silence_s=2.5, queue_wait_s=5.0),
        now=time.monotonic,
        observer=_Nobody(),
    )
    served = (ServedModel(loop=loop),)
    return Models(served=served, version="1", policy="triton", slo=Slo(), now=time.monotonic)


async def _clocks(backend: Backend, clocks: tuple[int, ...], told: dict[str, Any]) -> None:
    """Another clock every few hundredths of a second, while there is an engine."""
    draw = random.Random(told["seed"])
    while True:
        await asyncio.sleep(draw.uniform(*told["every_s"]))
        if backend.key is not None and backend.state == "up":
            backend.clock.set(FrequencyPlan(mhz=draw.choice(clocks), why=Reason.FIXED), time.monotonic())


@dataclass(slots=True)
class _House:
    models: Models
    backend: Backend
    writer: asyncio.StreamWriter
    asking: set[asyncio.Task[None]] = field(default_factory=set)

    async def obey(self, reader: asyncio.StreamReader) -> None:
        """What the lane says, line by line."""
        while line := await reader.readline():
            try:
                await self._do(json.loads(line))
            except Exception as error:
                logging.exception("not done")
                self.say(failed=repr(error))

    def say(self, **what: object) -> None:
        """One line to the lane."""
        self.writer.write(json.dumps(what).encode() + b"\n")

    async def _do(self, told: dict[str, Any]) -> None:
        engine = self.backend.engine
        assert isinstance(engine, SmallEngine)
        match told["do"]:
            case "ask":
                self.say(asked=told["id"])
                task = asyncio.create_task(self._ask(told["id"], told["tokens"]))
                self.asking.add(task)
                task.add_done_callback(self.asking.discard)
            case "engine dies":
                await engine.kill()
            case "engine is back":
                engine.back()
            case "engine stalls":
                engine.stall(told["for_s"])
            case "block":
                time.sleep(told["for_s"])
            case "child":
                self.say(child=_child())
            case "flood":
                for mhz in told["mhz"]:
                    if self.backend.key is not None:
                        self.backend.clock.set(FrequencyPlan(mhz=mhz, why=Reason.FIXED), time.monotonic())
                        await asyncio.sleep(0)

    async def _ask(self, number: int, tokens: int) -> None:
        how, why = "complete", ""
        try:
            await _answered(self.models, tokens)
        except ApiError as error:
            how, why = "told", f"{type(error).__name__}: {error}"
        except BaseException as error:
            how, why = "broken", repr(error)
            logging.exception("request %d", number)
        self.say(ended=number, how=how, why=why)


def _child() -> int:
    """A child that has everything open that this process has, and outlives it."""
    pid = os.fork()
    if pid == 0:
        time.sleep(CHILD_LIVES_S)
        os._exit(0)
    return pid


async def _answered(models: Models, tokens: int) -> None:
    """One request, as the HTTP side takes it through."""
    prompt = "one two three"
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    body["stream"] = True
    request = parse_request(COMPLETIONS, json.dumps(body).encode())
    count = await models.count(request)
    session: Session = models.session(request, count, Slo())
    async with session:
        engine = (await session.placed()).engine
        call = Call(
            method="POST",
            path=COMPLETIONS,
            headers=(),
            body=request.body,
            request_id=session.request.id,
            request=request,
        )
        async with engine.open(call) as reply:
            if reply.status != 200:
                raise EngineError(f"status {reply.status}")
            seen = 0
            while chunk := await reply.read():
                if came := chunk.count(b'"index"'):
                    seen += came
                    session.tokens(came)
            session.finish(tokens)
            if seen < tokens:
                raise AssertionError(f"{seen} of {tokens} tokens, and no error")
