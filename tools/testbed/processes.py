"""Processes of a testbed: each leads its own group, is ready before it is handed out, and ends with its block.

Every wait is bounded; a failure names the command and shows the end of its log. Knows nothing of what is started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
POLL_S = 0.05
KILLED_S = 2.0
"""Within this time the kernel has ended what was killed."""
_LOG_LINES = 25
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class ProcessError(Exception):
    """A process that did not become ready or failed; the message holds the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A running process and its group."""

    handle: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Also the number of its group."""
        return self.handle.pid

    def pids(self) -> list[int]:
        """Every process of the group."""
        return group(self.pid)

    def cpu_s(self) -> float:
        """Processor seconds of the whole group so far."""
        return sum(cpu_s(pid) for pid in self.pids())

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to every process of the group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


@contextmanager
def started(
    command: Sequence[str | Path],
    log: Path,
    *,
    ready: Callable[[], bool] = lambda: True,
    within_s: float = 60.0,
    environment: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Process]:
    """Run a command until the block ends. Raises ProcessError if it ends before it is ready, or is not ready in time.

    `environment` is added to this process's own; output is appended to `log`.
    """
    name, began_s, reported_s = Path(command[0]).name, time.monotonic(), 0.0
    with log.open("ab") as output:
        handle = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            cwd=ROOT,  # modules of tools are found from here
            start_new_session=True,
        )
    process = Process(handle=handle, log=log)
    try:
        while not ready():
            passed_s = time.monotonic() - began_s
            if handle.poll() is not None or passed_s > within_s:
                state = "is not ready" if handle.poll() is None else f"ended with status {handle.returncode}"
                words = " ".join(map(str, command))
                raise ProcessError(f"{words}: {state} after {passed_s:.0f} s; end of {log}:\n{process.last_lines()}")
            if passed_s - reported_s >= 10:
                reported_s = passed_s
                report(f"{name}: not ready after {passed_s:.0f} s")
            time.sleep(POLL_S)
        report(f"{name}: ready after {time.monotonic() - began_s:.0f} s")
        yield process
    finally:
        end(handle)


def completed(
    command: Sequence[str | Path], *, within_s: float = 400.0, environment: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Run a command to its end; its output and its errors. Raises ProcessError; nothing of it goes on running."""
    words = " ".join(map(str, command))
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | dict(environment or {}),
        cwd=ROOT,
        start_new_session=True,
    ) as handle:
        try:
            out, error = (data.decode(errors="replace") for data in handle.communicate(timeout=within_s))
        except subprocess.TimeoutExpired as late:
            raise ProcessError(f"{words}: not done after {within_s:.0f} s") from late
        finally:
            end(handle)
    if handle.returncode:
        last = "\n".join((out + error).splitlines()[-_LOG_LINES:])
        raise ProcessError(f"{words}: exit status {handle.returncode}\n{last}")
    return out, error


def end(handle: subprocess.Popen[bytes], patience_s: float = 8.0) -> None:
    """End a process that leads a group, and then the whole group, whatever state it is in."""
    if handle.poll() is None:
        handle.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            handle.wait(patience_s)
    with suppress(ProcessLookupError):
        os.killpg(handle.pid, signal.SIGKILL)
    handle.wait()
    until_s = time.monotonic() + KILLED_S
    while group(handle.pid) and time.monotonic() < until_s:
        time.sleep(POLL_S / 10)


# ---- readiness -----------------------------------------------------------------------------------------------


def answers(url: str, holding: bytes = b"") -> Callable[[], bool]:
    """Whether a GET of `url` is answered with status 200 and a body that holds these bytes."""

    def ready() -> bool:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            return bool(holding in answer.read())
        return False

    return ready


def post(url: str, fields: Mapping[str, object]) -> None:
    """POST a JSON object; the answer is not read. Raises OSError."""
    urllib.request.urlopen(url, json.dumps(fields).encode(), timeout=5).close()


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def free_port() -> int:
    """A port of loopback that is free now."""
    return free_ports(1)[0]


# ---- what /proc shows ----------------------------------------------------------------------------------------


def group(leader: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = _stat(int(folder.name))
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, all its threads; 0 if it has ended."""
    with suppress(OSError):
        fields = _stat(pid)
        return (int(fields[11]) + int(fields[12])) * _TICK_S
    return 0.0


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after "pid (command)": a command may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
