"""The gateway's end of an agent: GPUs on another host, with the same calls as those of this one.

While the agent cannot be reached they cannot be read, so their clock counts as unknown, and the engine serves on.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Self

from throttllem.agent.messages import (
    LINE_BYTES,
    PROTOCOL,
    Beat,
    Done,
    Found,
    FromGateway,
    Hello,
    MessageError,
    Read,
    Refused,
    Set,
    closed,
    from_agent,
    line,
)
from throttllem.gpu.boards.users import Placement
from throttllem.gpu.device import Reading, Switch, Work
from throttllem.gpu.hardware import Mode
from throttllem.gpu.keeper_client import HEARTBEATS_PER_TTL

log = logging.getLogger("throttllem.gpu")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_CONNECT_S = 5.0
_SET_S = 2.0
"""A clock that was not set within this time is not known."""
_STALE_S = 2.0
"""A reading that is older tells nothing."""


class RemoteGpu:
    """The GPUs `names` of one engine at the agent `address` (HOST:PORT). An async context manager, whose end lets go of
    them: the agent restores their clocks.

    `clocks_mhz`, ascending: every clock that will be decided; the last is the highest that they support. `ttl_s`: the
    agent restores the clocks so long after the gateway's last beat.
    """

    placement: Placement | None = None
    """Whether the engine runs on them is not checked."""

    def __init__(
        self,
        names: tuple[str, ...],
        *,
        address: str,
        context: ssl.SSLContext,
        mode: Mode,
        clocks_mhz: tuple[int, ...],
        ttl_s: float,
        version: str,
        now: Callable[[], float],
    ) -> None:
        self.names, self.address, self.mode = names, address, mode
        self.uuids: tuple[str, ...] = ()
        self.ladder_mhz: tuple[int, ...] = ()
        self._context, self._clocks_mhz, self._ttl_s, self._version = context, clocks_mhz, ttl_s, version
        self._now = now
        self._writer: asyncio.StreamWriter | None = None
        self._trouble = f"agent {address}: not reached yet"
        self._reading: Reading | None = None
        self._read_s = 0.0
        self._counter_j: float | None = None
        """The agent's counter at its last reading; None: a new connection, with which the counter starts at 0."""
        self._energy_j = 0.0
        self._switches = 0
        self._answers: dict[int, asyncio.Future[int | None]] = {}
        self._number = 0
        self._worked_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._switch: Switch | None = None

    async def __aenter__(self) -> Self:
        """Begin to reach the agent; does not wait for it."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    # ---- what the gateway calls ------------------------------------------------------------------------------------

    async def set_clock(self, mhz: int | None, sent: Callable[[], None] | None = None) -> int | None:
        """See `gpu.device.Gpu`. Raises OSError while the agent cannot be reached."""
        if self._writer is None:
            if mhz is None:
                return None  # the agent restores them without being asked
            raise OSError(self._trouble)
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send(Set(number=number, mhz=mhz))
            if sent is not None:
                sent()
            async with asyncio.timeout(_SET_S):
                found: int | None = await answer
                return found
        except TimeoutError as error:
            raise OSError(f"agent {self.address}: no answer in {_SET_S:g} s") from error
        finally:
            self._answers.pop(number, None)

    def read(self) -> Reading:
        """The last reading that arrived. Raises OSError while there is none, or none of late."""
        if self._reading is None:
            raise OSError(self._trouble)
        if self._now() - self._read_s > _STALE_S:
            raise OSError(f"agent {self.address}: no reading for {self._now() - self._read_s:.0f} s")
        return self._reading

    def worked(self, work: Work) -> None:
        """Sent to the agent with the next beat: it compares the engine's work with the utilization of the GPUs."""
        self._worked_s += work.seconds

    def idled(self, seconds: float) -> None:
        """Nothing to do: the GPU's counter measures it."""

    # ---- the connection --------------------------------------------------------------------------------------------

    async def _stay_connected(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                began_s = self._now()
                await self._connected()
            except (OSError, EOFError, MessageError) as error:
                why = f"agent {self.address}: {str(error) or 'it closed the connection'}"
                if isinstance(error, ssl.SSLError):
                    why += "; do both ends have the same pool secret?"
                if why != self._trouble:
                    log.error("%s; clocks are not set, and joules not metered, until it is back", why)
                self._trouble = why
            except Exception as error:  # the agent must be reached again after it
                log.exception("agent %s: the connection failed", self.address)
                self._trouble = f"agent {self.address}: {error!r}"
            finally:
                self._disconnected()
            pause_s = _FIRST_PAUSE_S if self._now() - began_s > _LONGEST_PAUSE_S else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2.0 * pause_s, _LONGEST_PAUSE_S)

    async def _connected(self) -> None:
        """One connection to its end. Raises OSError, EOFError and MessageError."""
        host, _, port = self.address.rpartition(":")
        async with asyncio.timeout(_CONNECT_S):
            reader, writer = await asyncio.open_connection(
                host.strip("[]"), int(port), ssl=self._context, limit=LINE_BYTES
            )
        try:
            writer.write(
                line(
                    Hello(
                        protocol=PROTOCOL,
                        version=self._version,
                        gpus=list(self.names),
                        mode=self.mode.value,
                        clocks_mhz=list(self._clocks_mhz),
                        ttl_s=self._ttl_s,
                    )
                )
            )
            async with asyncio.timeout(_CONNECT_S):
                found = from_agent(await reader.readline())
            if isinstance(found, Refused):
                raise ConnectionError(found.why)
            if not isinstance(found, Found):
                raise MessageError("its first message is no answer to a hello")
            self.uuids, self.ladder_mhz = tuple(found.uuids), tuple(found.ladder_mhz)
            log.info("agent %s (%s): holds %s", self.address, found.version, ", ".join(self.uuids))
            self._writer = writer
            beating = asyncio.create_task(self._beat())
            try:
                while text := await reader.readline():
                    self._take(text)
                raise EOFError
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
        except ValueError as error:
            raise MessageError(str(error)) from error
        finally:
            await closed(writer)

    def _take(self, text: bytes) -> None:
        match from_agent(text):
            case Read(unreadable=str(why)):
                self._reading, self._trouble = None, f"agent {self.address}: {why}"
            case Read() as read:
                self._take_reading(read)
            case Done(number=number, mhz=mhz):
                answer = self._answers.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(mhz)
            case Refused(why=why):
                raise ConnectionError(why)
            case Found():
                raise MessageError("a second answer to a hello")

    def _take_reading(self, read: Read) -> None:
        if self._counter_j is not None:
            self._energy_j += max(0.0, read.energy_j - self._counter_j)
        self._counter_j = read.energy_j
        if read.switch_number != self._switches and read.switch_mhz is not None and read.switch_s is not None:
            self._switches = read.switch_number
            self._switch = Switch(mhz=read.switch_mhz, seconds=read.switch_s)
        self._reading, self._read_s = read.reading(self._switch, energy_j=self._energy_j), self._now()

    async def _beat(self) -> None:
        while True:
            worked_s, self._worked_s = min(self._worked_s, 3600.0), 0.0
            self._send(Beat(worked_s=worked_s))
            await asyncio.sleep(self._ttl_s / HEARTBEATS_PER_TTL)

    def _send(self, message: FromGateway) -> None:
        assert self._writer is not None
        self._writer.write(line(message))

    def _disconnected(self) -> None:
        self._writer = self._reading = self._counter_j = None
        self._switches = 0
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ConnectionError(self._trouble))
        self._answers.clear()
