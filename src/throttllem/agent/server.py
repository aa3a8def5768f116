"""The agent: takes GPUs of its host for a gateway elsewhere, sets their clocks, and sends what they read.

A gateway holds its GPUs while its connection is there and its beats arrive; then they are restored. Knows nothing of
engines and requests.
"""

# Who ends what. The gateway beats `HEARTBEATS_PER_TTL` times in the time to live that it states. Without a beat for so
# long, or without its connection, the agent lets go of the GPUs: it ends the keeper's lease, which restores the clocks.
# The keeper's own lease needs this process: it restores them within its time to live where the agent is killed, stopped
# or hangs. So gateway, link, agent and host may each end at any moment, and no clock is left behind.

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from throttllem.agent.messages import (
    LINE_BYTES,
    PROTOCOL,
    Beat,
    Done,
    Found,
    FromAgent,
    Hello,
    MessageError,
    Read,
    Refused,
    Set,
    closed,
    from_gateway,
    line,
    shortened,
)
from throttllem.gpu.device import Switch, Work
from throttllem.gpu.hardware import HardwareGpu

log = logging.getLogger("throttllem.agent")

HELLO_S = 10.0
"""A connection says what it wants within this time."""
READ_S = 0.1
"""The time between two readings; the sampler does not read much more often."""
CONNECTIONS = 64
END_S = 10.0
"""So long a session may take to restore its clocks when the agent ends."""
_SLOW_BYTES = 1 << 20
"""A gateway that reads nothing while so much waits for it is let go."""

MakeGpu = Callable[[Hello], HardwareGpu]
"""The GPUs that a gateway asks for; opened by the agent."""


@dataclass(slots=True, eq=False)
class Agent:
    """Serves gateways. `version` is that of this program."""

    make_gpu: MakeGpu
    version: str
    held: dict[str, str] = field(default_factory=dict)
    """Who holds a GPU, by its UUID."""
    _sessions: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    async def serve(self, host: str, port: int, context: ssl.SSLContext, listening: Callable[[int], None]) -> None:
        """Serve until cancelled, and call `listening` with the port. Every session is then closed and restores its
        clocks, for which it has END_S. Raises OSError where it cannot listen.
        """
        server = await asyncio.start_server(self._connected, host, port, ssl=context, limit=LINE_BYTES)
        listening(server.sockets[0].getsockname()[1])
        try:
            async with server:
                await server.serve_forever()
        finally:
            for writer in self._sessions.values():
                writer.transport.abort()
            if self._sessions:
                _, late = await asyncio.wait(self._sessions, timeout=END_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= CONNECTIONS:
            writer.close()
            return
        task = asyncio.create_task(self._session(reader, writer))
        self._sessions[task] = writer
        task.add_done_callback(self._sessions.pop)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = "{}:{}".format(*writer.get_extra_info("peername")[:2])
        try:
            why = await self._hold(reader, writer, peer)
            log.info("gateway %s is gone: %s", peer, why)
        except EOFError:
            log.info("gateway %s is gone: it sent no hello", peer)
        except (OSError, ValueError) as error:  # GPUs that are not here, a message that is none
            log.warning("gateway %s: %s", peer, error)
            with contextlib.suppress(OSError):
                writer.write(line(Refused(why=shortened(str(error) or f"no hello within {HELLO_S:g} s"))))
                await asyncio.wait_for(writer.drain(), 1.0)
        except Exception:  # others are served on
            log.exception("gateway %s was let go", peer)
        finally:
            await closed(writer)

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> str:
        """Serve one gateway to its end; returns why it ended. Raises OSError, ValueError."""
        async with asyncio.timeout(HELLO_S):
            hello = from_gateway(await _line(reader))
        if not isinstance(hello, Hello):
            raise MessageError("the first message must be a hello")
        if hello.protocol != PROTOCOL:
            raise MessageError(
                f"this agent ({self.version}) speaks protocol {PROTOCOL}, the gateway ({hello.version}) "
                f"{hello.protocol}: install the same version at both ends"
            )
        async with self.make_gpu(hello) as gpu:
            if taken := [f"{uuid} ({self.held[uuid]})" for uuid in gpu.uuids if uuid in self.held]:
                raise ValueError(f"another gateway holds {', '.join(taken)}")
            mine = dict.fromkeys(gpu.uuids, peer)
            self.held |= mine
            try:
                log.info("gateway %s holds %s, clocks %s", peer, ", ".join(gpu.uuids), hello.mode)
                session = _Session(gpu, writer, hello.ttl_s)
                session.send(Found(version=self.version, uuids=list(gpu.uuids), ladder_mhz=list(gpu.ladder_mhz)))
                return await session.run(reader)
            finally:
                for uuid in mine:
                    del self.held[uuid]


@dataclass(slots=True, eq=False)
class _Session:
    """One gateway and the GPUs that it holds."""

    gpu: HardwareGpu
    writer: asyncio.StreamWriter
    ttl_s: float
    _switch: Switch | None = None
    _switches: int = 0

    async def run(self, reader: asyncio.StreamReader) -> str:
        """Carry out its commands until it is gone; returns why. Raises MessageError."""
        reading = asyncio.create_task(self._readings())
        setting: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    async with asyncio.timeout(self.ttl_s):
                        message = from_gateway(await _line(reader))
                except TimeoutError:
                    return f"no beat for {self.ttl_s:g} s"
                except EOFError:
                    return "it closed the connection"
                match message:
                    case Beat(worked_s=worked_s):
                        self.gpu.worked(
                            Work(seconds=worked_s, decode_sequences=0, kv_tokens=0, prefill_tokens=0, prefill_pairs=0.0)
                        )
                    case Set():
                        task = asyncio.create_task(self._set(message))
                        setting.add(task)
                        task.add_done_callback(setting.discard)
                    case Hello():
                        raise MessageError("a second hello")
                if reading.done():
                    return reading.result()
        finally:
            reading.cancel()
            for task in setting:
                task.cancel()
            await asyncio.gather(reading, *setting, return_exceptions=True)

    def send(self, message: FromAgent) -> None:
        """Send without waiting."""
        self.writer.write(line(message))

    async def _set(self, command: Set) -> None:
        mhz = None
        try:
            mhz = await self.gpu.set_clock(command.mhz)
        except OSError as error:
            log.warning("%s was not set: %s", command.mhz, error)
        self._send_reading()
        self.send(Done(number=command.number, mhz=mhz))

    async def _readings(self) -> str:
        """Send readings until the gateway takes no more of them; returns why they end."""
        while self.writer.transport.get_write_buffer_size() < _SLOW_BYTES:
            self._send_reading()
            await asyncio.sleep(READ_S)
        return "it reads nothing"

    def _send_reading(self) -> None:
        try:
            found = self.gpu.read()
        except OSError as error:
            self.send(Read(unreadable=shortened(str(error))))
            return
        if found.switch is not None and found.switch is not self._switch:
            self._switch = found.switch
            self._switches += 1
        self.send(Read.of(found, self._switches))


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line. Raises EOFError at the end, MessageError for one that is too long."""
    try:
        text = await reader.readline()
    except ValueError as error:
        raise MessageError(f"a message of more than {LINE_BYTES} bytes") from error
    except OSError as error:
        raise EOFError from error
    if not text.endswith(b"\n"):
        raise EOFError
    return text
