"""The systems of the overload test, each started for its runs: vLLM with and without a limit, the gateway before it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.engines.vllm_server import FLAGS, Server, vllm_server
from tools.evaluation.gateway_process import gateway_process
from tools.evaluation.overload_load import Lengths, Outcome, Promise, jobs, judge, send
from tools.evaluation.overload_pace import install
from tools.evaluation.section import Workshop

CATALOGUE = ("--gpu", "a100-40gb-sxm", "--model", "llama-3-8b", "--tp", "1")
"""Of the simulated GPU; the speed is learned."""
SEQUENCES = 256
"""What vLLM would batch on most GPUs, and the simulated engine does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Seconds of each run (the first `warm_s` are not judged), of the profile, and the limits that are tried."""

    warm_s: float = 30.0
    judged_s: float = 60.0
    burst: int = 800
    profile_s: float = 100.0
    limits: tuple[int, ...] = (72, 88, 112, 144)
    seeds: tuple[int, ...] = (11, 12, 13)
    tuning_seed: int = 100


QUICK = Plan(warm_s=3.0, judged_s=10.0, burst=300, profile_s=60.0, limits=(64,), seeds=(11,))


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """Where everything is, and how runs are made."""

    workshop: Workshop
    venv: Path
    model: Path
    plan: Plan
    lengths: Lengths

    @property
    def folder(self) -> Path:
        """A place for files of the runs."""
        return self.workshop.folder

    @contextmanager
    def vllm(self, limit: int | None = None) -> Iterator[Server]:
        """vLLM, on one core; this process and its children stay off it meanwhile."""
        flags = (
            *FLAGS,
            "--max-num-seqs",
            str(SEQUENCES),
            "--enable-logging-iteration-details",
            *(() if limit is None else ("--max-num-queued-reqs", str(limit))),
        )
        environment = {"THROTTLLEM_STATS": str(self.folder / "steps")} | install(self.folder / "pace")
        before = os.sched_getaffinity(0)
        with vllm_server(self.venv, self.model, self.folder / "vllm.log", flags=flags, environment=environment) as up:
            try:
                os.sched_setaffinity(0, up.cores)
                yield up
            finally:
                os.sched_setaffinity(0, before)

    @contextmanager
    def gateway(self, server: Server) -> Iterator[str]:
        """The gateway in front of it; what it learned of lengths stays for the next one."""
        settings = {"admission.unmeetable": "reject", "engines.0.stats": str(self.folder / "steps")}
        given = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
        arguments = ["--engine", server.url, *CATALOGUE, "--tables", str(self.folder / "tables"), *given]
        with gateway_process([*arguments, "--policy", "throttllem"], self.folder / "gateway") as up:
            yield up.url

    def learn(self, server: Server) -> None:
        """Profile the engine and train its table, as a user would."""
        profile, tables = self.folder / "profile.csv", self.folder / "tables"
        seconds = ("--seconds", str(self.plan.profile_s), "--stats", str(self.folder / "steps"))
        self._throttllem("profile", str(profile), "--url", server.url, *CATALOGUE, *seconds)
        self._throttllem("train", str(profile), "--out", str(tables))

    def run(self, url: str, cores: frozenset[int], *, rate: float, seed: int, promise: Promise) -> Outcome:
        """One run of one system."""
        plan = self.plan
        load = jobs(self.lengths, rate=rate, seconds=plan.warm_s + plan.judged_s, seed=seed)
        results = send(url, load, self.folder, cores, promise)
        return judge(results, promise, from_s=plan.warm_s, to_s=plan.warm_s + plan.judged_s)

    def _throttllem(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("throttllem")), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{(done.stderr or done.stdout)[-3000:]}")
