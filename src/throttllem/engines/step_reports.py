"""Steps of an engine as datagrams: the format that its plug-in sends, and the receiver that makes reports of them.

A datagram may be lost (no listener, a full buffer): a gap in the sequence numbers shows it, and the step number stays
right. Imports only the standard library, as the plug-in runs inside the engine's process. Knows nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from throttllem.engines.base import Report

MAGIC = b"tls1"
PACKED = struct.Struct("<4sQQBqdIIdIIIId")
STEP, DETAILED = 1, 2
"""Flags: the numbers are those of a step; its prompt tokens, decode sequences and seconds are the engine's own."""
BUFFER_BYTES = 1 << 20
DRAINED = 256
"""The most datagrams that are read before other tasks run."""
MOST_STEPS = 1 << 40
"""Step and sequence numbers stay below it: at 1000 steps a second they reach it after 34 years."""
MOST_REQUESTS = 1 << 20
MOST_TOKENS = 1 << 28
"""The most requests at once, and tokens in one step: no engine has more."""
LONGEST_S = 86400.0
"""No step takes longer."""
LATEST_S = 1e10
"""No monotonic clock shows more: 300 years."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One datagram. `boot` identifies one start of an engine, `sequence` counts datagrams, `step` iterations from 0
    (None: an empty step, in which nothing was computed). `kv_usage` 0 to 1. `prompt_tokens` that were computed
    in the step if `seconds` is there, else those of the prompts that were complete with it. `decode_sequences` and
    `seconds` only where the engine measures each iteration.
    """

    boot: int
    sequence: int
    step: int | None
    monotonic_s: float
    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    decode_sequences: int | None = None
    seconds: float | None = None

    def pack(self) -> bytes:
        """The datagram."""
        detailed = self.decode_sequences is not None and self.seconds is not None
        flags = STEP * (self.step is not None) + DETAILED * detailed
        counts = (self.prompt_tokens, self.generated_tokens, self.preemptions, self.decode_sequences or 0)
        state = (self.monotonic_s, self.running, self.waiting, self.kv_usage)
        return PACKED.pack(MAGIC, self.boot, self.sequence, flags, self.step or 0, *state, *counts, self.seconds or 0.0)


def unpack(datagram: bytes) -> StepStats | None:
    """The step in a datagram; None if it holds none, or a number beyond what an engine can report."""
    if len(datagram) != PACKED.size or datagram[:4] != MAGIC:
        return None
    _, boot, sequence, flags, step, monotonic_s, running, waiting, kv_usage, *counts, seconds = PACKED.unpack(datagram)
    numbered = 0 <= step < MOST_STEPS and sequence < MOST_STEPS
    counted = max(running, waiting, counts[2], counts[3]) <= MOST_REQUESTS and max(counts[:2]) <= MOST_TOKENS
    timed = 0 <= monotonic_s <= LATEST_S and 0 <= seconds <= LONGEST_S
    if not (numbered and counted and timed and 0 <= kv_usage <= 1):
        return None
    return StepStats(
        boot=boot,
        sequence=sequence,
        step=step if flags & STEP else None,
        monotonic_s=monotonic_s,
        running=running,
        waiting=waiting,
        kv_usage=kv_usage,
        prompt_tokens=counts[0],
        generated_tokens=counts[1],
        preemptions=counts[2],
        decode_sequences=counts[3] if flags & DETAILED else None,
        seconds=seconds if flags & DETAILED else None,
    )


def parse_address(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """A Unix socket's path (it holds a slash) or HOST:PORT of loopback. Raises ValueError for anything else."""
    if "/" in text:
        return socket.AF_UNIX, text
    host, colon, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        address = ipaddress.ip_address(host)
        number = int(port)
    except ValueError as error:
        raise ValueError(f"stats = {text!r}: must be a path with a slash, or HOST:PORT as in 127.0.0.1:9911") from error
    if not colon or not address.is_loopback or not 0 <= number < 65536:
        raise ValueError(f"stats = {text!r}: must be an address of this machine only, as in 127.0.0.1:9911")
    return (socket.AF_INET if address.version == 4 else socket.AF_INET6), (host, number)


def bind(text: str) -> socket.socket:
    """A socket that listens at the address; a Unix socket takes datagrams of this user only. Raises OSError."""
    family, address = parse_address(text)
    listener = socket.socket(family, socket.SOCK_DGRAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        if isinstance(address, str):
            _clear(address)
            # Before bind, so that there is no moment in which others may send.
            os.fchmod(listener.fileno(), 0o600)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"stats = {text!r}: cannot listen there: {error.strerror or error}") from error
    return listener


def check_address(text: str) -> None:
    """Raise OSError if the address cannot be bound now, ValueError if it is none."""
    bind(text).close()
    if parse_address(text)[0] == socket.AF_UNIX:
        Path(text).unlink(missing_ok=True)


def _clear(path: str) -> None:
    """Remove a socket that a dead process left behind. Raises OSError if a living one listens there."""
    if not Path(path).is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()


class StepReceiver:
    """Listens for the steps of one engine, whose KV cache has `kv_blocks`.

    Counts `received` and `lost` datagrams (gaps in the sequence), `garbage` (no step), and those of `other_boots`: the
    engine was restarted, or two engines send to one address; the first one received counts.
    """

    def __init__(self, address: str, *, kv_blocks: int) -> None:
        self.address = address
        self.received = 0
        self.lost = 0
        self.garbage = 0
        self.other_boots = 0
        self.preemptions = 0
        self.is_listening = False
        self.last: StepStats | None = None
        self._kv_blocks = kv_blocks

    @contextmanager
    def listening(self, report: Callable[[Report], None]) -> Iterator[None]:
        """Call `report` with every step while in the block. Raises OSError if the address cannot be bound."""
        loop = asyncio.get_running_loop()
        listener = bind(self.address)
        try:
            # A reader rather than an endpoint: not every event loop has those for Unix datagrams.
            loop.add_reader(listener, self._drain, listener, report)
            self.is_listening = True
            yield
        finally:
            self.is_listening = False
            loop.remove_reader(listener)
            bound = listener.getsockname()
            listener.close()
            if isinstance(bound, str):
                Path(bound).unlink(missing_ok=True)

    def _drain(self, listener: socket.socket, report: Callable[[Report], None]) -> None:
        for _ in range(DRAINED):
            try:
                datagram = listener.recv(PACKED.size + 1)
            except BlockingIOError:
                return
            if (step := self.take(datagram)) is not None:
                report(step)

    def take(self, datagram: bytes) -> Report | None:
        """The report of one datagram; None: it does not count."""
        step, before = unpack(datagram), self.last
        if step is None:
            self.garbage += 1
            return None
        if before is not None and step.boot != before.boot:
            self.other_boots += 1
            return None
        if before is not None and step.sequence <= before.sequence:
            self.garbage += 1
            return None
        gap = 0 if before is None else step.sequence - before.sequence - 1
        self.last, self.received, self.lost = step, self.received + 1, self.lost + gap
        self.preemptions += step.preemptions
        return self._report(step, None if gap else before)

    def _report(self, step: StepStats, before: StepStats | None) -> Report:
        seconds = step.seconds
        if seconds is None and before is not None and before.running + before.waiting > 0:
            # The engine went straight from one step to the next.
            seconds = step.monotonic_s - before.monotonic_s
        numbered = step.step is not None
        return Report(
            running=step.running,
            waiting=step.waiting,
            kv_blocks=round(step.kv_usage * self._kv_blocks),
            step=step.step,
            seconds=seconds if numbered else None,
            prompt_tokens=step.prompt_tokens if numbered else None,
            generated_tokens=step.generated_tokens if numbered else None,
            decode_sequences=step.decode_sequences,
        )
