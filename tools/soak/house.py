"""A schedule's processes and GPUs while it is played: keeper, gateway and engine run, and are started again by an init
that restarts always; what ends is noted. Knows nothing of faults.
"""

from __future__ import annotations

import asyncio
import ctypes
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
from tools.soak.board import Board, make_board
from tools.soak.child import Child
from tools.soak.evidence import Evidence
from tools.soak.place import Place, waited_s
from tools.soak.schedule import Schedule
from tools.soak.witness import Witness

RESTART_S = (0.05, 0.1)
START_S = 4.0
CLOCKS_MHZ = (600, 705, 810, 900, 1005, 1110, 1200, 1305, 1410)
"""What the gateway asks for; more than what every keeper allows."""


class House:
    """A context manager; nothing of it runs any more when it is left."""

    machine: Machine
    board: Board
    engine: Child
    keeper: Child
    gateway: Child
    witness: Witness

    def __init__(self, schedule: Schedule, place: Place) -> None:
        self.schedule, self.place = schedule, place
        self.evidence = Evidence(schedule=schedule)
        self.draw = random.Random(f"house {schedule.seed}")
        self.socket = place.run / "keeper.sock"
        self.copies = journal_paths(place.state, self.socket)
        self.lifting = asyncio.Event()
        self.children: list[Child] = []
        self.waited_s = waited_s()
        self.engine_there = True
        self.waiting: list[tuple[str, Callable[[], bool]]] = []
        """Kinds that wait for their moment, and whether they still do."""
        self._keeper_held, self._leaving = 0, False
        self._sent: dict[int, Child] = {}
        self.held = tuple(index for index, gpu in enumerate(schedule.gpus) if gpu.held)
        self.opted = tuple(index for index, gpu in enumerate(schedule.gpus) if gpu.allowed)
        self._gateways = 0

    async def __aenter__(self) -> Self:
        self.place.clear()
        parts = self.place.parts[: len(self.schedule.gpus)]
        self.machine = Machine.create(self.place.folder / "gpus", parts, library=self.place.library)
        for gpu, plan in zip(self.machine.gpus, self.schedule.gpus, strict=True):
            gpu.root_only(os.geteuid() == 0)
            if plan.before is not None:
                gpu.lock_by_other(*plan.before)
        self.board = make_board(self.place.folder / "board")
        self.witness = Witness(evidence=self.evidence, machine=self.machine, copies=self.copies)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._leaving = True
        for child in self.children:
            child.send(signal.SIGKILL)
        for heir in self.witness.heirs.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(heir, signal.SIGKILL)
            os.close(heir)
        for child in self.children:
            await child.dead.wait()
            child.close()
        self.machine.close()

    def uuids(self, indices: tuple[int, ...]) -> list[str]:
        """As NVML tells them."""
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
        on_death: Callable[[Child], None] = lambda _: None,
        on_word: Callable[[dict[str, Any]], None] = lambda _: None,
        **told: object,
    ) -> Child:
        """A new process."""
        known = {
            "role": role,
            "log": str(self.place.folder / f"{role}.log"),
            "environment": {"FAKE_NVML_STATE": str(self.place.folder / "gpus"), "NOTIFY_SOCKET": ""},
            "library": str(self.place.library),
            "seed": self.schedule.seed * 1000 + len(self.children),
        }
        child = Child(self.place.zygote, known | told, on_death=on_death, on_word=on_word)
        self.children.append(child)
        return child

    def start_engine(self) -> None:
        """The process that keeps the gateway's GPUs busy."""
        self.engine = self.start("engine", gpus=self.held)

    def start_keeper(self) -> None:
        """As an init does it."""
        arguments = ["--socket", str(self.socket), "--state", str(self.place.state)]
        if os.geteuid() != 0:
            arguments += ["--user", str(os.geteuid())]
        for uuid, plan in zip(self.uuids(tuple(range(len(self.schedule.gpus)))), self.schedule.gpus, strict=True):
            if plan.allowed:
                arguments += ["--gpu", f"{uuid}={plan.allowed[0]}-{plan.allowed[1]}"]
            if plan.allowed and plan.baseline:
                arguments += ["--normally", f"{uuid}={plan.baseline[0]}-{plan.baseline[1]}"]
        self.witness.keeper_starts()
        copies = [str(copy) for copy in self.copies]
        board = str(self.place.folder / "board")
        self.keeper = self.start("keeper", self._keeper_died, arguments=arguments, board=board, copies=copies)

    def start_gateway(self, *, rival: bool = False) -> Child:
        """One more; a `rival` is not the one that requests go to, and is not started again."""
        self._gateways += 1
        number = self._gateways
        self.witness.rivals = self.witness.rivals or rival
        child = self.start(
            "gateway",
            on_death=lambda it: self._gateway_died(it, number),
            on_word=lambda word: self.witness.gateway_said(word, number),
            gpus=self.uuids(self.held),
            indices=self.held,
            clocks_mhz=CLOCKS_MHZ,
            ttl_s=self.schedule.ttl_s,
            socket=str(self.socket),
            every_s=self.schedule.clock_every_s,
            engine_there=self.engine_there,
        )
        if not rival:
            self.gateway = child
        return child

    async def answers(self, within_s: float = START_S) -> dict[str, Any] | None:
        """The keeper's status as soon as it tells; None if it does not in time."""
        until_s = time.monotonic() + within_s
        while (left_s := until_s - time.monotonic()) > 0:
            with suppress(KeeperError):
                return await keeper_status(self.socket, left_s)
            await asyncio.sleep(0.01)
        return None

    def ask(self, number: int, tokens: int) -> None:
        """A request to the gateway that is there now, if one is."""
        if self.gateway.alive:
            self._sent[number] = self.gateway
            self.gateway.say(do="ask", id=number, tokens=tokens)

    def unanswered(self) -> bool:
        """A request has not ended, or its gateway has not read it yet."""
        asks = self.evidence.asks
        unheard = any(gateway.alive and number not in asks for number, gateway in self._sent.items())
        return unheard or any(ask.how is None for ask in asks.values())

    def nvml_fault(self, call: str, **how: Any) -> int:
        """Calls of NVML go wrong from now on (`Machine.fault`); the fault's number."""
        place = next(index for index, fault in enumerate(self._faults) if not fault.active)
        self.machine.fault(call, **how)
        return place

    def nvml_calls(self, fault: int) -> int:
        """So many calls have met it."""
        return int(self._faults[fault].seen)

    def nvml_again(self, fault: int) -> None:
        """It is over. Its place is not used again: somebody may still sleep in it."""
        self._faults[fault].times = 0

    @property
    def _faults(self) -> ctypes.Array[FaultLayout]:
        found: ctypes.Array[FaultLayout] = self.machine._state.layout.faults
        return found

    # ---- and started again -----------------------------------------------------------------------------------

    @contextmanager
    def without_keeper(self) -> Iterator[None]:
        """Nobody starts it anew in here; right afterwards somebody does."""
        self._keeper_held += 1
        try:
            yield
        finally:
            self._keeper_held -= 1
            self._keeper_again()

    def _keeper_died(self, child: Child) -> None:
        self.witness.keeper_died(child)
        self._later(self._keeper_again)

    def _gateway_died(self, child: Child, number: int) -> None:
        self.witness.gateway_died(child, number)
        if child is self.gateway:
            self._later(self._gateway_again)

    def _keeper_again(self) -> None:
        if not (self.keeper.alive or self._keeper_held or self._leaving):
            self.start_keeper()

    def _gateway_again(self) -> None:
        if not (self.gateway.alive or self.witness.ending or self._leaving):
            self.start_gateway()

    def _later(self, what: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(self.draw.uniform(*RESTART_S), what)
