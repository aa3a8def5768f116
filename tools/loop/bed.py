"""Everything that runs while the loop is closed: fake GPU, keeper, vLLM at the GPU's speed, gateway, meter.

Each is a process, as in service, and ends whatever happens. Knows nothing of what is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

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
    physics,
)
from tools.nvml.build import NAME
from tools.nvml.machine import STATE, FakeGpu, Machine, Part, a100
from tools.testbed.cores import real_time
from tools.testbed.engines.vllm import Vllm, tiny_model, vllm
from tools.testbed.engines.vllm_pace import Physics, Settings, install
from tools.testbed.gateway import Gateway, gateway, throttllem
from tools.testbed.keeper import Keeper, keeper
from tools.testbed.known_clients import tokenizer_cache
from tools.testbed.processes import started
from tools.testbed.report import Workspace

CATALOGUE = ("--gpu", KIND, "--model", MODEL, "--tp", str(TP))
FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", str(CONTEXT_TOKENS)),
    *("--max-num-seqs", str(MAX_BATCH), "--max-num-batched-tokens", str(BUDGET_TOKENS)),
    # One block is vLLM's own.
    *("--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(kv_blocks() + 1)),
)
FREE_S = 2.0
HEADROOM = 1.001


class LoopError(Exception):
    """The chain does not work; the message says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBed:
    """What is up. `tokenizer` is a Hugging Face home, `machine` the environment in which processes see the GPU."""

    workspace: Workspace
    plan: Plan
    gpu: FakeGpu
    machine: Mapping[str, str]
    server: Vllm
    keeper: Keeper
    clients: Path
    tokenizer: Path

    @property
    def folder(self) -> Path:
        """For files of the runs."""
        return self.workspace.folder

    @property
    def steps(self) -> Path:
        """Every step of the engine."""
        return self.folder / "steps.csv"

    @property
    def tables(self) -> Path:
        """The gateway's performance table."""
        return self.folder / "tables"

    def learn(self) -> None:
        """Profile the engine and train its tables, as a user would."""
        profile, plan = self.folder / "profile.parquet", self.plan
        with self.quiet():
            throttllem(
                *("profile", profile, "--url", self.server.url, "--stats", self.server.stats, *CATALOGUE),
                *("--gpus", self.gpu.uuid, "--keeper", self.keeper.socket, "--seconds", f"{plan.profile_s:g}"),
                *("--clocks", ",".join(map(str, plan.clocks_mhz))),
                environment=self.machine,
            )
        self.freed()
        # Cores that other work shares scatter the rows: the loop's own figures show what the table is worth.
        throttllem("train", profile, "--out", self.tables, "--accept")

    @contextmanager
    def quiet(self) -> Iterator[bool]:
        """All that is part of the loop, and what is started meanwhile, before other work on this machine; whether that
        is allowed.
        """
        with real_time([*self.server.process.pids(), self.keeper.process.pid]) as allowed:
            yield allowed

    @contextmanager
    def gateway(self, policy: str, clocks: str, folder: Path) -> Iterator[Gateway]:
        """`throttllem serve` in front of the engine; clocks "on" or "dry-run"."""
        plan = self.plan
        settings = {
            "clocks.keeper": self.keeper.socket,
            "engines.0.stats": self.server.stats,
            "length.predictor": "max-tokens",
            "throttle.switch_latency_s": SWITCH_S,
        }
        arguments = (
            *("--engine", self.server.url, *CATALOGUE, "--tables", str(self.tables), "--policy", policy),
            *("--gpus", self.gpu.uuid, "--clocks", clocks),
            *("--slo-e2e", f"{plan.e2e_s:g}", "--slo-tbt", f"{plan.tbt_s:g}"),
            *(text for name, value in settings.items() for text in ("--set", f"{name}={value}")),
        )
        with gateway(arguments, folder, environment=self.machine) as up:
            yield up

    @contextmanager
    def meter(self, file: Path, up: Gateway) -> Iterator[None]:
        """Reads the GPU's counter into a file meanwhile, and the processor time of gateway and keeper."""
        command: list[str | Path] = [sys.executable, "-m", "tools.loop.meter", self.gpu.uuid, file]
        command += [str(up.process.pid), str(self.keeper.process.pid)]
        log = file.with_suffix(".log")
        with started(command, log, ready=file.exists, within_s=10.0, environment=self.machine):
            yield

    def freed(self) -> float:
        """Seconds until the GPU is unlocked. Raises LoopError if it stays locked."""
        began_s = time.monotonic()
        while (lock := self.gpu.lock) is not None:
            if time.monotonic() - began_s > FREE_S:
                raise LoopError(f"the GPU is still locked to {lock} MHz {FREE_S:g} s after the end of its user")
            time.sleep(0.005)
        return time.monotonic() - began_s


@contextmanager
def opened(workspace: Workspace, plan: Plan) -> Iterator[LoopBed]:
    """All of it, but for gateways and meters. Raises MissingError, ProcessError, LoopError."""
    folder, venv, clients = workspace.folder, workspace.environment("vllm"), workspace.environment("clients")
    part = modelled_part()
    with ExitStack() as stack:
        machine = stack.enter_context(Machine.create(folder / "gpus", [part]))
        seen = machine.environment()
        stack.callback(_report_end, machine.gpus[0], workspace)
        ranges = {part.uuid: (plan.lowest_mhz, max(plan.clocks_mhz))}
        up = stack.enter_context(keeper(ranges, folder, environment=seen))
        model = tiny_model(venv, folder / "model", "--least")
        # vLLM itself must not take the fake for a GPU that it could compute on.
        paced = install(pace(machine, part, folder / "steps.csv"), folder / "pace") | {STATE: str(machine.file)}
        server = stack.enter_context(
            vllm(venv, folder, model=model, flags=FLAGS, environment=paced, report=workspace.report)
        )
        yield LoopBed(
            workspace=workspace,
            plan=plan,
            gpu=machine.gpus[0],
            machine=seen,
            server=server,
            keeper=up,
            clients=clients,
            tokenizer=tokenizer_cache(model, folder / "tokenizer"),
        )


def modelled_part() -> Part:
    """The GPU, which at full utilisation draws what the heaviest step draws: those with prompts more than decoding."""
    law = physics()
    (part,) = a100(model=MODEL, tp=TP, context_keeps_clock=True)
    batches = (0, 1, MAX_BATCH // 4, MAX_BATCH)
    steps = [
        (batch, batch * context, prompts, prompts * pairs)
        for batch in batches
        for context in (16, CONTEXT_TOKENS)
        for prompts in (0, 16, BUDGET_TOKENS // 4, BUDGET_TOKENS)
        for pairs in (8.0, prompts / 2, CONTEXT_TOKENS - prompts / 2)
        if batch or prompts
    ]
    most_w = [max(law.iteration(mhz, *step)[1] for step in steps) for mhz in part.clocks_mhz]
    return replace(part, busy_w=tuple(accumulate((HEADROOM * watts for watts in most_w), max)))


def pace(machine: Machine, part: Part, log: Path) -> Settings:
    """vLLM follows the fake GPU."""
    busy_w = {str(mhz): watts for mhz, watts in zip(part.clocks_mhz, part.busy_w, strict=True)}
    library = str(machine.library_folder / NAME)
    physics = Physics(library=library, gpu=0, kind=KIND, model=MODEL, tp=TP, idle_w=part.idle_w, busy_w=busy_w)
    return Settings(physics=physics, log=str(log))


def _report_end(gpu: FakeGpu, workspace: Workspace) -> None:
    state = "free" if gpu.lock is None else f"STILL LOCKED to {gpu.lock} MHz"
    workspace.report(f"all processes have ended; the GPU is {state}")
