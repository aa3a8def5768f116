"""What clients of others see of vLLM, directly and through the gateway: the same load, in alternation, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.evaluation.compare import AGAIN, DIRECT, THROUGH, alternate, as_json, compared_table
from tools.testbed.engines.vllm import UNCACHED, Vllm, vllm
from tools.testbed.figures import Figures
from tools.testbed.gateway import gateway
from tools.testbed.known_clients import openai_figures, run_aiperf, run_bench_serve, run_openai, tokenizer_cache
from tools.testbed.report import Section, Workspace, version_of
from tools.testbed.trace import Scale, azure_slice, write_jobs, write_mooncake, write_timed_trace

ROUNDS, CHEAP_ROUNDS = 3, 6
"""Multiples of the number of ways."""
CONCURRENCY = 8
SLO = ("--slo-e2e", "30", "--slo-tbt", "0.5")
TEXT = """\
The same load goes to vLLM {vllm} (CPU, a tiny random model) directly and through `throttllem serve` (plug-in on,
SLOs set, flight recorder on), in turn, {cheap} rounds of `openai`, {rounds} of the others. Figures are medians over
the rounds, with the least and the most in brackets; requests and errors are of all rounds together. TTFT is over
requests, ITL over the gaps between chunks as they reach the client (vLLM's server puts tokens together when it falls
behind), TPOT over requests' means. An answer with another number of tokens than was asked for counts as an error.

*direct again* is the control: the same way a second time, so what differs between the two is noise of the machine. A
figure is *beyond noise* only if no run through the gateway lies among the direct ones; into others nothing is to be
read.

vLLM's engine computes on one core. Its API server, the gateway and the client share the other: part of every difference
is that the client has less of it, on a machine with cores to spare it is smaller.

`openai`: {jobs} requests a round, half of them streams, half chats, {concurrency} at once, 64 tokens each.
`vllm bench serve` (timed trace) and `aiperf` (Mooncake trace, fixed schedule): {trace} requests a round, a slice of
Azure's chat trace: {scale}.
"""

Run = Callable[[str, str], Figures]
"""Of an address, and a label for files."""


def section(workspace: Workspace) -> Section:
    """Run every client against both. Raises MissingError where something is not installed."""
    venv, clients = workspace.environment("vllm"), workspace.environment("clients")
    rounds, cheap = (1, 1) if workspace.quick else (ROUNDS, CHEAP_ROUNDS)
    scale, trace, jobs = Scale(), 24 if workspace.quick else 80, 24 if workspace.quick else 200
    folder = workspace.folder
    with vllm(venv, folder, flags=UNCACHED, report=workspace.report) as engine:
        arguments = ("--engine", engine.url, "--set", f"engines.0.stats={engine.stats}", *SLO)
        with gateway(arguments, folder / "gateway") as up:
            run_openai(clients, up.url, _warm_up(folder), concurrency=4)
            runs = _runs(engine, folder, clients, scale, trace, jobs)
            for name, run in runs.items():  # each client once, unmeasured: files, caches and compilers are warm then
                run(up.url, f"warm-up-{name}".replace(" ", "-"))
            urls = {DIRECT: engine.url, AGAIN: engine.url, THROUGH: up.url}
            found = {
                name: alternate(name, run, urls, cheap if name == "openai" else rounds, workspace.report)
                for name, run in runs.items()
            }
    text = TEXT.format(
        vllm=version_of(venv, "vllm"),
        rounds=rounds,
        cheap=cheap,
        jobs=jobs,
        concurrency=CONCURRENCY,
        trace=trace,
        scale=scale.words(),
    )
    return Section(
        title="Clients of others: directly and through the gateway",
        text=text,
        tables=tuple(compared_table(f"`{name}`", each) for name, each in found.items()),
        results={"rounds": {name: as_json(each) for name, each in found.items()}},
        versions={
            "vLLM": version_of(venv, "vllm"),
            "openai": version_of(clients, "openai"),
            "aiperf": version_of(clients, "aiperf"),
        },
    )


def _runs(engine: Vllm, folder: Path, clients: Path, scale: Scale, trace: int, jobs: int) -> dict[str, Run]:
    sent = azure_slice(trace, scale)
    timed = write_timed_trace(sent, folder / "timed.jsonl")
    mooncake = write_mooncake(sent, folder / "mooncake.jsonl")
    cache = tokenizer_cache(engine.model, folder / "hugging-face")
    mixed = [
        {"at_s": 0.0, "chat": bool(n & 1), "stream": bool(n & 2), "prompt_tokens": 100, "output_tokens": 64}
        for n in range(jobs)
    ]
    written = write_jobs(mixed, folder / "jobs.jsonl")
    return {
        "openai": lambda url, _: openai_figures(run_openai(clients, url, written, concurrency=CONCURRENCY)),
        "vllm bench serve": lambda url, label: run_bench_serve(
            engine.environment, url, timed, engine.model, requests=trace, folder=_made(folder / label)
        ),
        "aiperf": lambda url, label: run_aiperf(
            clients, url, mooncake, cache, requests=trace, folder=_made(folder / label)
        ),
    }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _warm_up(folder: Path) -> Path:
    """vLLM compiles a few things with its first requests."""
    jobs = [
        {"at_s": 0.0, "chat": bool(n & 1), "stream": True, "prompt_tokens": 300, "output_tokens": 40} for n in range(8)
    ]
    return write_jobs(jobs, folder / "warm-up.jsonl")
