"""A real vLLM on loopback, serving a tiny random model: started, waited for, ended with all its processes.

On a machine of few cores vLLM's engine and worker spin, and delay clients by up to 100 ms at a time. Here they get one
core, and this process with whatever it starts meanwhile keeps to the others.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.testbed.cores import pinned
from tools.testbed.processes import Process, answers, completed, free_port, started

READY_S = 180.0
"""It takes 25 s on two cores that are otherwise idle."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
FLAGS = ("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64", "--enforce-eager")
UNCACHED = (*FLAGS, "--no-enable-prefix-caching")
"""A prompt costs as much the second time: rounds are alike."""
MODEL = "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """A running vLLM. `stats`: the socket where its plug-in sends steps."""

    url: str
    environment: Path
    model: Path
    stats: str
    process: Process

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.signal_group(signal.SIGKILL)

    def kill_workers(self) -> None:
        """End every process but the API server, which has to notice."""
        for pid in self.process.pids():
            if pid != self.process.pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def tiny_model(venv: Path, folder: Path, *options: str) -> Path:
    """The folder of the tiny model, made by the engine's environment where it is missing; `--least`: a smaller one."""
    if not (folder / "config.json").is_file():
        script = Path(__file__).with_name("tiny_model.py")
        # -P: the modules beside the script are not its own.
        completed([venv / "bin/python", "-P", script, folder, *options], environment=ENVIRONMENT)
    return folder


@contextmanager
def vllm(
    venv: Path,
    folder: Path,
    *,
    model: Path | None = None,
    flags: Sequence[str] = FLAGS,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    own_core: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Vllm]:
    """`vllm serve` of the environment `venv`; its log, its steps' socket and, where none is given, its model in
    `folder`. `own_core`: the engine shares no core with clients, where there are two. Raises ProcessError if it does
    not start.
    """
    model = model or tiny_model(venv, folder / "model")
    port = port or free_port()
    url, stats = f"http://127.0.0.1:{port}", str(folder / "steps.sock")
    command = [venv / "bin/vllm", "serve", model, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port]
    # Its compiler and tools are looked up on the path.
    known = {**ENVIRONMENT, "THROTTLLEM_STATS": stats, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    with started(
        [*map(str, command), "--api-server-count", "1", *flags],
        folder / "vllm.log",
        ready=answers(f"{url}/health"),
        within_s=READY_S,
        environment={**known, **(environment or {})},
        report=report,
    ) as process:
        cores = _share_cores(process) if own_core else os.sched_getaffinity(0)
        with pinned(cores):
            yield Vllm(url=url, environment=venv, model=model, stats=stats, process=process)


def _share_cores(process: Process) -> set[int]:
    """Give the engine's processes one core and the API server the others; returns those."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return set(cores)
    for pid in process.pids():
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores[1:] if pid == process.pid else cores[:1])
    return set(cores[1:])
