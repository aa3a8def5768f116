"""A schedule's processes and GPUs while it is played: keeper, gateway and engine, and their restart by an init system.

Requests go to the gateway by HTTP. How everything ends is noted. Knows nothing of faults.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from throttllem.gpu.keeper_client import KeeperError, keeper_status
from throttllem.keeper.journal import journal_paths
from tools.nvml.layout import FaultLayout
from tools.nvml.machine import Machine
from tools.soak.evidence import Evidence
from tools.soak.keeper_process import Board, make_board
from tools.soak.observer import Observer
from tools.soak.process import SoakProcess
from tools.soak.sandbox import Sandbox, waited_s
from tools.soak.schedule import Schedule
from tools.testbed.client import Client
from tools.testbed.engines.openai_engine import MODEL
from tools.testbed.processes import free_port

RESTART_S = (0.05, 0.1)
START_S = 4.0
CLOCKS_MHZ = (600, 705, 810, 900, 1005, 1110, 1200, 1305, 1410)
"""What the gateway asks for; more than what every keeper allows."""


class SoakBed:
    """A context manager; nothing of it runs any more when it is left."""

    machine: Machine
    board: Board
    engine: SoakProcess
    keeper: SoakProcess
    gateway: SoakProcess
    observer: Observer
    client: Client

    def __init__(self, schedule: Schedule, sandbox: Sandbox) -> None:
        self.schedule, self.sandbox = schedule, sandbox
        self.evidence = Evidence(schedule=schedule)
        self.draw = random.Random(f"bed {schedule.seed}")
        self.socket = sandbox.run / "keeper.sock"
        self.copies = journal_paths(sandbox.state, self.socket)
        self.lifting = asyncio.Event()
        self.children: list[SoakProcess] = []
        self.waited_s = waited_s()
        self.waiting: list[tuple[str, Callable[[], bool]]] = []
        """Kinds that wait for their moment, and whether they still do."""
        self._keeper_held, self._leaving = 0, False
        self._asking: set[asyncio.Task[None]] = set()
        self.held = tuple(index for index, gpu in enumerate(schedule.gpus) if gpu.held)
        self.opted = tuple(index for index, gpu in enumerate(schedule.gpus) if gpu.allowed)
        self._gateways, self._served = 0, (0, "")

    async def __aenter__(self) -> Self:
        self.sandbox.clear()
        parts = self.sandbox.parts[: len(self.schedule.gpus)]
        self.machine = Machine.create(self.sandbox.folder / "gpus", parts, library=self.sandbox.library)
        for gpu, plan in zip(self.machine.gpus, self.schedule.gpus, strict=True):
            gpu.root_only(os.geteuid() == 0)
            if plan.before is not None:
                gpu.lock_by_other(*plan.before)
        self.board = make_board(self.sandbox.folder / "board")
        self.client = await Client("", MODEL).__aenter__()
        self.observer = Observer(evidence=self.evidence, machine=self.machine, copies=self.copies)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._leaving = True
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        await self.client.__aexit__()
        for child in self.children:
            child.send(signal.SIGKILL)
        for heir in self.observer.heirs.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(heir, signal.SIGKILL)
            os.close(heir)
        for child in self.children:
            await child.dead.wait()
            child.close()
        self.machine.close()

    def uuids(self, indices: tuple[int, ...]) -> list[str]:
        """Of these GPUs."""
        return [self.machine.gpus[index].uuid for index in indices]

    def now(self) -> float:
        """Since the schedule began."""
        return time.monotonic() - self.evidence.began_s

    async def until(self, at_s: float) -> None:
        """Sleep to this moment of the schedule."""
        await asyncio.sleep(at_s - self.now())

    # ---- processes -------------------------------------------------------------------------------------------

    def start(
        self,
        role: str,
        on_death: Callable[[SoakProcess], None] = lambda _: None,
        on_line: Callable[[dict[str, Any]], None] = lambda _: None,
        **order: object,
    ) -> SoakProcess:
        """A new process of this role (`roles`)."""
        folder = self.sandbox.folder
        forked = self.sandbox.server.fork(
            role,
            log=str(folder / f"{role}.log"),
            environment={
                "FAKE_NVML_STATE": str(folder / "gpus"),
                "NOTIFY_SOCKET": "",
                "THROTTLLEM_CACHE_DIR": str(folder),
            },
            library=str(self.sandbox.library),
            seed=self.schedule.seed * 1000 + len(self.children),
            **order,
        )
        process = SoakProcess(forked, role, on_death=on_death, on_line=on_line)
        self.children.append(process)
        return process

    def start_engine(self) -> None:
        """It keeps the gateway's GPUs busy."""
        self.engine = self.start("engine", gpus=self.held, port=self.sandbox.engine_port)

    def start_keeper(self) -> None:
        """As an init does it."""
        arguments = ["--socket", str(self.socket), "--state", str(self.sandbox.state)]
        if os.geteuid() != 0:
            arguments += ["--user", str(os.geteuid())]
        for uuid, plan in zip(self.uuids(tuple(range(len(self.schedule.gpus)))), self.schedule.gpus, strict=True):
            if plan.allowed:
                arguments += ["--gpu", f"{uuid}={plan.allowed[0]}-{plan.allowed[1]}"]
            if plan.allowed and plan.baseline:
                arguments += ["--normally", f"{uuid}={plan.baseline[0]}-{plan.baseline[1]}"]
        self.observer.keeper_starts()
        copies = [str(copy) for copy in self.copies]
        board = str(self.sandbox.folder / "board")
        self.keeper = self.start("keeper", self._keeper_died, arguments=arguments, board=board, copies=copies)

    def start_gateway(self, *, rival: bool = False) -> SoakProcess:
        """One more; a `rival` is not the one that requests go to, and is not started again."""
        self._gateways += 1
        number, port = self._gateways, free_port()
        self.observer.rivals = self.observer.rivals or rival
        settings = {
            "clocks.keeper": self.socket,
            "clocks.ttl_s": self.schedule.ttl_s,
            "limits.engine_wait_s": 4,
            "limits.silence_s": 2.5,
            "limits.queue_wait_s": 5,
            "limits.drain_s": 4,
            "recorder.enabled": "false",
            "engines.0.max_batch": 16,
            "state_dir": self.sandbox.folder / f"gateway-{number}",
        }
        arguments = ["serve", "--port", str(port), "--engine", f"http://127.0.0.1:{self.sandbox.engine_port}"]
        arguments += ["--policy", "triton", "--clocks", "on", "--tp", str(len(self.held))]
        arguments += ["--gpus", ",".join(self.uuids(self.held))]
        arguments += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        process = self.start(
            "gateway",
            on_death=lambda it: self._gateway_died(it, number),
            on_line=lambda line: self.observer.gateway_sent(line, number),
            arguments=arguments,
            clocks_mhz=CLOCKS_MHZ,
            every_s=self.schedule.clock_every_s,
        )
        if not rival:
            self.gateway, self._served = process, (number, f"http://127.0.0.1:{port}")
        return process

    async def answers(self, within_s: float = START_S) -> dict[str, Any] | None:
        """The keeper's status as soon as it answers; None if it does not in time."""
        until_s = time.monotonic() + within_s
        while (left_s := until_s - time.monotonic()) > 0:
            with suppress(KeeperError):
                return await keeper_status(self.socket, left_s)
            await asyncio.sleep(0.01)
        return None

    def ask(self, number: int, tokens: int) -> None:
        """A request to the gateway that runs now, if one does."""
        if self.gateway.alive:
            task = asyncio.create_task(self._ask(number, tokens, *self._served))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def unanswered(self) -> bool:
        """A request has not ended."""
        return bool(self._asking) and any(ask.how is None for ask in self.evidence.asks.values())

    async def _ask(self, number: int, tokens: int, gateway: int, url: str) -> None:
        """One that nobody takes, as a gateway is only about to listen, was not asked."""
        self.observer.asked(number, gateway)
        body = json.dumps(self.client.fields(tokens=tokens, min_tokens=tokens)).encode()
        answer = await self.client.send(body, url=url)
        if answer.refused:
            del self.evidence.asks[number]
        elif answer.served and answer.tokens == tokens:
            self.observer.ended(number, "complete", "")
        elif answer.error is not None:
            self.observer.ended(number, "error", str(answer.error))
        elif answer.status is None or answer.broken:
            self.observer.ended(number, "cut", answer.outcome, begun=answer.status is not None)
        else:
            self.observer.ended(number, "broken", f"{answer.outcome}, {answer.tokens} of {tokens} tokens")

    def nvml_fault(self, call: str, **how: Any) -> int:
        """Calls of NVML go wrong from now on (`Machine.fault`); the fault's number."""
        place = next(index for index, fault in enumerate(self._faults) if not fault.active)
        self.machine.fault(call, **how)
        return place

    def nvml_calls(self, fault: int) -> int:
        """So many calls have met it."""
        return int(self._faults[fault].seen)

    def nvml_again(self, fault: int) -> None:
        """It is over. Its place is not used again: a call may still sleep in it."""
        self._faults[fault].times = 0

    @property
    def _faults(self) -> ctypes.Array[FaultLayout]:
        found: ctypes.Array[FaultLayout] = self.machine._state.layout.faults
        return found

    # ---- and started again -----------------------------------------------------------------------------------

    @contextmanager
    def without_keeper(self) -> Iterator[None]:
        """It is not restarted in here, but right afterwards."""
        self._keeper_held += 1
        try:
            yield
        finally:
            self._keeper_held -= 1
            self._keeper_again()

    def _keeper_died(self, child: SoakProcess) -> None:
        self.observer.keeper_died(child)
        self._later(self._keeper_again)

    def _gateway_died(self, child: SoakProcess, number: int) -> None:
        self.observer.gateway_died(child, number)
        if child is self.gateway:
            self._later(self._gateway_again)

    def _keeper_again(self) -> None:
        if not (self.keeper.alive or self._keeper_held or self._leaving):
            self.start_keeper()

    def _gateway_again(self) -> None:
        if not (self.gateway.alive or self.observer.ending or self._leaving):
            self.start_gateway()

    def _later(self, what: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(self.draw.uniform(*RESTART_S), what)
