"""A real vLLM on loopback for tests and evaluations: started, waited for, and ended for certain with all its processes.

On a machine of few cores vLLM's engine and worker spin, and keep clients waiting for up to 100 ms at a time; they get
a core of their own here, and `Server.cores` are those left for everybody else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

READY_S = 180.0
"""It takes 25 s on two cores with nothing else to do."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
FLAGS = ("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64", "--enforce-eager")
MODEL = "tiny"


class ServerError(Exception):
    """A vLLM that did not come up, with the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One that is up. `pid` leads its process group; `cores` are those for clients."""

    url: str
    port: int
    pid: int
    log: Path
    cores: frozenset[int]

    def kill(self) -> None:
        """End it at once, as a crash would."""
        _signal(self.pid, signal.SIGKILL)

    def kill_workers(self) -> None:
        """End all of it but the API server, which has to find out."""
        for pid in _group(self.pid):
            if pid != self.pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def tiny_model(venv: Path, folder: Path, *options: str) -> Path:
    """The folder of the tiny model, made by the engine's own environment if not there yet; `--least`: a smaller one."""
    if not (folder / "config.json").is_file():
        command = [str(venv / "bin/python"), str(Path(__file__).parent / "tiny_model.py"), str(folder), *options]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | ENVIRONMENT)
    return folder


@contextmanager
def vllm_server(
    venv: Path,
    model: Path,
    log: Path,
    *,
    flags: Sequence[str] = FLAGS,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    own_core: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Server]:
    """`vllm serve` of the environment `venv` on a free port, or this one. Raises ServerError if it does not come up.

    `say` hears how it goes; `own_core`: the engine shares no core with clients, where there are two.
    """
    port = port or free_port()
    command = [str(venv / "bin/vllm"), "serve", str(model), "--served-model-name", MODEL, "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--api-server-count", "1", *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            # Its compiler and tools are looked up on the path.
            env=os.environ | ENVIRONMENT | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"} | dict(environment or {}),
            start_new_session=True,
        )
    try:
        _wait(process, port, log, say)
        cores = _share_cores(process.pid) if own_core else frozenset(os.sched_getaffinity(0))
        yield Server(url=f"http://127.0.0.1:{port}", port=port, pid=process.pid, log=log, cores=cores)
    finally:
        end(process)


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes], patience_s: float = 8.0) -> None:
    """End a process that leads its group, and the whole group, whatever state it is in."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, say: Callable[[str], None]) -> None:
    began, told = time.monotonic(), 0.0
    while True:
        passed = time.monotonic() - began
        if process.poll() is not None or passed > READY_S:
            state = "is not ready" if process.poll() is None else f"ended with status {process.returncode}"
            last = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise ServerError(f"vllm {state} after {passed:.0f} s; the end of {log}:\n{last}")
        with suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            say(f"vllm: ready after {passed:.0f} s")
            return
        if passed - told >= 10:
            told = passed
            say(f"vllm: not ready after {passed:.0f} s")
        time.sleep(0.2)


def _share_cores(leader: int) -> frozenset[int]:
    """Give the engine's processes one core, and the API server (`leader`) the others; returns those."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return frozenset(cores)
    for pid in _group(leader):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores[1:] if pid == leader else cores[:1])
    return frozenset(cores[1:])


def _group(leader: int) -> list[int]:
    """The processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (command) state parent group ...; a command may hold spaces and brackets.
            if int(stat.read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(stat.parent.name))
    return found
