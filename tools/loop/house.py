"""Everything that runs while the loop is closed: the fake GPU, the keeper, vLLM at its speed, a gateway, a meter.

Each is a process of its own, as in service, and is ended whatever happens. Knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.engines.vllm_server import Server, end, tiny_model, vllm_server
from tools.evaluation.gateway_process import Gateway, gateway_process
from tools.evaluation.known_clients import tokenizer_cache
from tools.evaluation.overload_pace import install_plugin
from tools.evaluation.proxies import Proxy
from tools.evaluation.quiet import first
from tools.evaluation.section import ROOT, Workshop
from tools.loop import hook
from tools.loop.plan import (
    BLOCK_TOKENS,
    BUDGET_TOKENS,
    CONTEXT_TOKENS,
    KIND,
    MAX_BATCH,
    MODEL,
    SWITCH_S,
    TP,
    Plan,
    kv_blocks,
)
from tools.nvml.build import NAME
from tools.nvml.machine import FakeGpu, Machine, Part, a100

CATALOGUE = ("--gpu", KIND, "--model", MODEL, "--tp", str(TP))
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", str(CONTEXT_TOKENS)),
    *("--max-num-seqs", str(MAX_BATCH), "--max-num-batched-tokens", str(BUDGET_TOKENS)),
    # One block is vLLM's own.
    *("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(kv_blocks() + 1)),
)
READY_S, FREE_S = 10.0, 2.0
TABLES = "tables"


class LoopError(Exception):
    """The chain does not do what it is for; the message says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """What is up. `steps` is the file that the hook writes, `tokenizer` a Hugging Face home, `keeper` a process."""

    workshop: Workshop
    plan: Plan
    gpu: FakeGpu
    server: Server
    keeper: int
    clients: Path
    tokenizer: Path

    @property
    def folder(self) -> Path:
        """A place for files of the runs."""
        return self.workshop.folder

    @property
    def steps(self) -> Path:
        """Every step of the engine."""
        return self.folder / "steps.csv"

    @property
    def tables(self) -> Path:
        """What the gateway decides by."""
        return self.folder / TABLES

    def learn(self) -> None:
        """Profile the engine and train its tables, as a user would."""
        profile, plan = self.folder / "profile.parquet", self.plan
        with self.quiet():
            throttllem(
                *("profile", str(profile), "--url", self.server.url, "--stats", _stats(self.folder), *CATALOGUE),
                *("--gpus", self.gpu.uuid, "--keeper", str(_socket(self.folder)), "--seconds", f"{plan.profile_s:g}"),
                *("--clocks", ",".join(map(str, plan.clocks_mhz))),
            )
        self.freed()
        throttllem("train", str(profile), "--out", str(self.tables))

    @contextmanager
    def quiet(self) -> Iterator[bool]:
        """All that is part of the loop, and what is started meanwhile, before whatever else this machine does; whether
        that is allowed.
        """
        engine = Proxy(name="vllm", url=self.server.url, pid=self.server.pid)
        with first([*engine.pids(), self.keeper]) as allowed:
            yield allowed

    @contextmanager
    def gateway(self, policy: str, clocks: str, folder: Path) -> Iterator[Gateway]:
        """`throttllem serve` in front of the engine; clocks "on" or "advise"."""
        plan = self.plan
        settings = {
            "clocks.keeper": _socket(self.folder),
            "engines.0.stats": _stats(self.folder),
            "length.predictor": "max-tokens",
            "throttle.switch_latency_s": SWITCH_S,
        }
        arguments = (
            *("--engine", self.server.url, *CATALOGUE, "--tables", str(self.tables), "--policy", policy),
            *("--gpus", self.gpu.uuid, "--clocks", clocks),
            *("--slo-e2e", f"{plan.e2e_s:g}", "--slo-tbt", f"{plan.tbt_s:g}"),
            *(text for name, value in settings.items() for text in ("--set", f"{name}={value}")),
        )
        with gateway_process(arguments, folder) as up:
            yield up

    @contextmanager
    def meter(self, file: Path, gateway: Gateway) -> Iterator[None]:
        """Reads the GPU's counter into a file meanwhile, and the time of gateway and keeper."""
        command = ("-m", "tools.loop.meter", self.gpu.uuid, str(file), str(gateway.pid), str(self.keeper))
        with _process(command, file.with_suffix(".log"), file):
            yield

    def freed(self) -> float:
        """Seconds until nothing locks the GPU any more. Raises LoopError if it stays locked."""
        began_s = time.monotonic()
        while (lock := self.gpu.lock) is not None:
            if time.monotonic() - began_s > FREE_S:
                raise LoopError(f"the GPU is still locked to {lock} MHz {FREE_S:g} s after the end of its user")
            time.sleep(0.005)
        return time.monotonic() - began_s


@contextmanager
def opened(workshop: Workshop, plan: Plan) -> Iterator[House]:
    """All of it, but for gateways and meters. Raises MissingError, ServerError, LoopError."""
    folder, vllm, clients = workshop.folder, workshop.environment("vllm"), workshop.environment("clients")
    (part,) = a100(model=MODEL, tp=TP, context_keeps_clock=True)
    with ExitStack() as stack:
        machine = stack.enter_context(Machine.create(folder / "gpus", [part]))
        stack.callback(_tell_end, machine.gpus[0], workshop.say)
        before = os.environ.get("LD_LIBRARY_PATH", "")
        stack.enter_context(environment(machine.environment()))
        keeper = stack.enter_context(_keeper(part.uuid, plan, folder))
        model = tiny_model(vllm, folder / "model", "--least")
        # vLLM itself must not take the fake for a GPU that it could compute on.
        hooked = _hooked(machine, part, folder) | {"LD_LIBRARY_PATH": before, "THROTTLLEM_STATS": _stats(folder)}
        log = folder / "vllm.log"
        server = stack.enter_context(vllm_server(vllm, model, log, flags=FLAGS, environment=hooked, say=workshop.say))
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, server.cores)
        yield House(
            workshop=workshop,
            plan=plan,
            gpu=machine.gpus[0],
            server=server,
            keeper=keeper,
            clients=clients,
            tokenizer=tokenizer_cache(model, folder / "tokenizer"),
        )


def _tell_end(gpu: FakeGpu, say: Callable[[str], None]) -> None:
    say("all processes have ended; the GPU is " + ("free" if gpu.lock is None else f"STILL LOCKED to {gpu.lock} MHz"))


def throttllem(*arguments: str) -> None:
    """The command, its progress on our terminal. Raises LoopError."""
    command = [str(Path(sys.executable).with_name("throttllem")), *arguments]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise LoopError(f"{' '.join(command)}: exit status {status}")


def _stats(folder: Path) -> str:
    return str(folder / "steps.sock")


def _socket(folder: Path) -> Path:
    return folder / "keeper.sock"


@contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """For all that is started meanwhile."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _keeper(uuid: str, plan: Plan, folder: Path) -> Iterator[int]:
    """The keeper; its process id."""
    clocks = f"{uuid}={plan.lowest_mhz}-{max(plan.clocks_mhz)}"
    command = ("-m", "throttllem.keeper", "--gpu", clocks, "--user", str(os.getuid()), "--socket", str(_socket(folder)))
    with _process((*command, "--state", str(folder / "keeper")), folder / "keeper.log", _socket(folder)) as pid:
        yield pid


@contextmanager
def _process(arguments: Sequence[str], log: Path, sign: Path) -> Iterator[int]:
    """This Python with these arguments; up once the file `sign` is there. Raises LoopError."""
    with log.open("wb") as output:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    try:
        deadline_s = time.monotonic() + READY_S
        while not sign.exists():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise LoopError(f"{' '.join(arguments[:2])} is not up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        yield process.pid
    finally:
        end(process)


def _hooked(machine: Machine, part: Part, folder: Path) -> dict[str, str]:
    """The environment that makes vLLM follow the fake GPU."""
    settings = hook.Settings(
        library=str(machine.library_folder / NAME),
        gpu=0,
        kind=KIND,
        model=MODEL,
        tp=TP,
        idle_w=part.idle_w,
        busy_w={str(mhz): watts for mhz, watts in zip(part.clocks_mhz, part.busy_w, strict=True)},
        log=str(folder / "steps.csv"),
    )
    told = folder / "hook.json"
    told.write_text(json.dumps(settings._asdict()))
    return install_plugin(Path(hook.__file__), folder / "hook") | {hook.VARIABLE: str(told)}
