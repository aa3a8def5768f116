"""Steps of an engine as datagrams: the format that its plug-in sends, and the receiver that makes reports of them.

A datagram may be lost (no listener, a full buffer): a gap in the sequence numbers shows it, and the step number stays
right. A Unix socket takes those of this user only; over UDP each carries a MAC (HMAC-SHA256 with a shared secret).
Imports only the standard library, as the plug-in runs inside the engine's process. Knows nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from throttllem.engines.base import Report

log = logging.getLogger("throttllem.gateway")

MAGIC = b"tls2"
PACKED = struct.Struct("<4sQQBqdIIdIIIIIIIId")
MAC_BYTES = 32
STEP, DETAILED, SPECULATED = 1, 2, 4
"""Flags: the numbers are those of a step; its prompt tokens, decode sequences and seconds are the engine's own; it
speculates."""
SHORTEST_SECRET = 16
LONGEST_SECRET = 4096
BURST_STEPS = 4096
STEPS_PER_S = 2000
"""Most that sequence numbers may rise at once, and in a second: more than any engine steps."""
OLDEST_S = 5.0
"""The first datagram was sent this long ago at most, by the monotonic clock, which all processes of a machine share: a
recorded one does not count. Later ones need higher numbers."""
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
    in the step if `seconds` is there, else those of the prompts that were complete with it. `prefix_queries` prompt
    tokens were looked up in the prefix cache in the step, `prefix_hits` of them were there. `drafted_tokens` and
    `accepted_tokens` only where the engine speculates. `decode_sequences` and `seconds` only where the engine measures
    each iteration.
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
    prefix_queries: int = 0
    prefix_hits: int = 0
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    decode_sequences: int | None = None
    seconds: float | None = None

    def pack(self, secret: bytes | None = None) -> bytes:
        """The datagram, with its MAC if there is a secret."""
        detailed = self.decode_sequences is not None and self.seconds is not None
        speculated = self.drafted_tokens is not None and self.accepted_tokens is not None
        flags = STEP * (self.step is not None) + DETAILED * detailed + SPECULATED * speculated
        counts = (self.prompt_tokens, self.generated_tokens, self.preemptions, self.decode_sequences or 0)
        more = (self.prefix_queries, self.prefix_hits, self.drafted_tokens or 0, self.accepted_tokens or 0)
        state = (self.monotonic_s, self.running, self.waiting, self.kv_usage)
        numbers = (*state, *counts, *more, self.seconds or 0.0)
        packed = PACKED.pack(MAGIC, self.boot, self.sequence, flags, self.step or 0, *numbers)
        return packed if secret is None else packed + _mac(packed, secret)


def _mac(packed: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, packed, "sha256")


def unpack(datagram: bytes, secret: bytes | None = None) -> StepStats | None:
    """The step in a datagram; None if it holds none, has no right MAC where there is a secret, or holds a number beyond
    what an engine can report.
    """
    if secret is not None:
        datagram, mac = datagram[:-MAC_BYTES], datagram[-MAC_BYTES:]
        if not hmac.compare_digest(_mac(datagram, secret), mac):
            return None
    if len(datagram) != PACKED.size or datagram[:4] != MAGIC:
        return None
    _, boot, sequence, flags, step, monotonic_s, running, waiting, kv_usage, *counts, seconds = PACKED.unpack(datagram)
    numbered = 0 <= step < MOST_STEPS and sequence < MOST_STEPS
    counted = max(running, waiting, counts[2], counts[3]) <= MOST_REQUESTS
    counted = counted and max(*counts[:2], *counts[4:]) <= MOST_TOKENS
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
        prefix_queries=counts[4],
        prefix_hits=counts[5],
        drafted_tokens=counts[6] if flags & SPECULATED else None,
        accepted_tokens=counts[7] if flags & SPECULATED else None,
        decode_sequences=counts[3] if flags & DETAILED else None,
        seconds=seconds if flags & DETAILED else None,
    )


def parse_address(text: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """A Unix socket's absolute path (the text holds a slash) or HOST:PORT of loopback. Raises ValueError for anything
    else.
    """
    if "/" in text:
        return socket.AF_UNIX, os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (".." as Path keeps it)
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


def same_address(sent_to: str, text: str) -> bool:
    """Whether the plug-in's address is the one that `text` names here. A relative path of another process is not known.
    Raises ValueError if `text` is no address.
    """
    ours = parse_address(text)
    if isinstance(ours[1], str):
        return sent_to.startswith("/") and os.path.realpath(sent_to) == os.path.realpath(ours[1])
    try:
        return "/" not in sent_to and parse_address(sent_to) == ours
    except ValueError:
        return False


def read_secret(path: Path) -> bytes:
    """The shared secret in a file that only its owner can read. Raises ValueError."""
    try:
        with path.open("rb") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(LONGEST_SECRET + 1)
    except OSError as error:
        raise ValueError(f"the secret of step reports, {path}: {error.strerror or error}") from error
    if mode & 0o077:
        raise ValueError(f"the secret of step reports, {path}: others can read or write it; chmod 600 {path}")
    secret = text.strip()
    if not SHORTEST_SECRET <= len(secret) <= LONGEST_SECRET:
        how = f"head -c 32 /dev/urandom | base64 > {path}"
        raise ValueError(f"the secret of step reports, {path}: must be of {SHORTEST_SECRET} bytes or more: {how}")
    return secret


def bind(text: str) -> socket.socket:
    """A socket that listens at the address; a Unix socket takes datagrams of this user only, in a folder that no other
    user can change (made where it is missing). Raises OSError.
    """
    family, address = parse_address(text)
    listener = socket.socket(family, socket.SOCK_DGRAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        if isinstance(address, str):
            _check_folder(Path(address).parent)
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
    if isinstance(address := parse_address(text)[1], str):
        Path(address).unlink(missing_ok=True)


def check_folder(text: str) -> None:
    """Raise OSError if the folder of a Unix socket cannot be used, ValueError if this is no address. Makes nothing."""
    if not isinstance(address := parse_address(text)[1], str):
        return
    folder = Path(address).parent
    if folder.exists():
        _check_owner(folder)
        return
    above = next(each for each in folder.parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"its folder {folder} cannot be made: use a folder of this user")


def _check_folder(folder: Path) -> None:
    """Make the folder if it is missing. Raises OSError if another user could put another socket there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)


def _check_owner(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        how = f"use a folder of this user, or chmod go-w {folder}"
        raise PermissionError(errno.EPERM, f"other users can write in its folder {folder}; {how}")


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

    Counts `received` and `lost` datagrams (gaps in the sequence), `garbage` (no step, no right MAC, repeated, a first
    one that is old, or a number that no engine can have reached since), and those of `other_boots`: of another engine,
    or of another start of this one. `boot` is the start that the engine itself reports; without it that of the first
    datagram counts.
    """

    def __init__(self, address: str, *, kv_blocks: int, boot: int | None = None, secret: bytes | None = None) -> None:
        self.address = address
        self.boot = boot
        self.received = 0
        self.lost = 0
        self.garbage = 0
        self.other_boots = 0
        self.preemptions = 0
        self.is_listening = False
        self.last: StepStats | None = None
        self._kv_blocks = kv_blocks
        self._secret = secret
        self._size = PACKED.size + (0 if secret is None else MAC_BYTES)
        self._received_s = 0.0
        self._logged_old = False
        self._numbered: tuple[int, int] | None = None
        """Number and sequence number of the last datagram of a step."""

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
                datagram = listener.recv(self._size + 1)
            except BlockingIOError:
                return
            if (step := self.take(datagram)) is not None:
                report(step)

    def take(self, datagram: bytes, received_s: float | None = None) -> Report | None:
        """The report of one datagram, received at this monotonic time (None: now); None: it does not count."""
        step, before = unpack(datagram, self._secret), self.last
        at_s = time.monotonic() if received_s is None else received_s
        if step is None:
            self.garbage += 1
            return None
        if self.boot is not None and step.boot != self.boot:
            self.other_boots += 1
            return None
        if before is None and abs(at_s - step.monotonic_s) > OLDEST_S:
            self._refuse_old(at_s - step.monotonic_s)
            return None
        self.boot = step.boot
        if before is not None and not self._follows(step, before, at_s - self._received_s):
            self.garbage += 1
            return None
        gap = 0 if before is None else step.sequence - before.sequence - 1
        self.last, self.received, self.lost = step, self.received + 1, self.lost + gap
        self._received_s = at_s
        if step.step is not None:
            self._numbered = step.step, step.sequence
        self.preemptions += step.preemptions
        return self._report(step, None if gap else before)

    def _refuse_old(self, age_s: float) -> None:
        self.garbage += 1
        if not self._logged_old:
            self._logged_old = True
            why = "the first to count must be newer, by the monotonic clock of this machine"
            log.warning("a step report at %s was sent %.0f s ago: %s", self.address, age_s, why)

    def _follows(self, step: StepStats, before: StepStats, elapsed_s: float) -> bool:
        """Whether one start of an engine can have sent `step` after `before`: a datagram a step, none twice."""
        datagrams = step.sequence - before.sequence
        if not 0 < datagrams <= BURST_STEPS + STEPS_PER_S * elapsed_s:
            return False
        if step.step is None or self._numbered is None:
            return True
        number, sequence = self._numbered
        return 0 < step.step - number <= step.sequence - sequence

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
            prefix_queries=step.prefix_queries if numbered else None,
            prefix_hits=step.prefix_hits if numbered else None,
            drafted_tokens=step.drafted_tokens if numbered else None,
            accepted_tokens=step.accepted_tokens if numbered else None,
        )
