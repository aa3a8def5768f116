"""What clients of others see of vLLM, directly and through the gateway: the same load, in alternation, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.evaluation.alternate import AGAIN, DIRECT, THROUGH, Rounds, alternate, as_json, loads
from tools.evaluation.figures import HEAD, Figures, side_by_side
from tools.evaluation.known_clients import (
    openai_figures,
    run_aiperf,
    run_bench_serve,
    run_openai,
    tokenizer_cache,
)
from tools.evaluation.machine import version_of
from tools.evaluation.section import Section, Table, Workshop
from tools.evaluation.stage import Stage, on_stage
from tools.evaluation.trace import Scale, azure_slice, write_jobs, write_mooncake, write_timed_trace

ROUNDS, CHEAP_ROUNDS = 3, 6
"""Multiples of the number of ways."""
CONCURRENCY = 8
SLO = ("--slo-e2e", "30", "--slo-tbt", "0.5")
TEXT = """\
The same load goes to vLLM {vllm} (CPU, a tiny random model) directly and through `throttllem serve` (plug-in on,
promises set, flight recorder on), in turn, {cheap} rounds of `openai`, {rounds} of the others. Figures are medians over
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


def section(workshop: Workshop) -> Section:
    """Run every client against both. Raises MissingError where something is not installed."""
    clients, rounds = workshop.environment("clients"), 1 if workshop.quick else ROUNDS
    cheap = 1 if workshop.quick else CHEAP_ROUNDS
    scale, trace, jobs = Scale(), 24 if workshop.quick else 80, 24 if workshop.quick else 200
    with on_stage(workshop, options=SLO) as stage:
        run_openai(clients, stage.through, _warm_up(workshop.folder), concurrency=4)
        runs = _runs(stage, workshop.folder, clients, scale, trace, jobs)
        for run in runs.values():  # each client once, unmeasured: files, caches and compilers are warm then
            run(stage.through, "warm-up-" + str(len(list(workshop.folder.iterdir()))))
        urls = {DIRECT: stage.direct, AGAIN: stage.direct, THROUGH: stage.through}
        found = {
            name: alternate(name, run, urls, cheap if name == "openai" else rounds, workshop.say)
            for name, run in runs.items()
        }
    tables = [compared_table(f"`{name}`", each) for name, each in found.items()]
    text = TEXT.format(
        vllm=version_of(stage.vllm, "vllm"),
        rounds=rounds,
        cheap=cheap,
        jobs=jobs,
        concurrency=CONCURRENCY,
        trace=trace,
        scale=scale.told(),
    )
    return Section(
        title="Clients of others: directly and through the gateway",
        text=text,
        tables=tuple(tables),
        results={"rounds": {name: as_json(each) for name, each in found.items()}},
        versions={
            "vLLM": version_of(stage.vllm, "vllm"),
            "openai": version_of(clients, "openai"),
            "aiperf": version_of(clients, "aiperf"),
        },
    )


def _runs(stage: Stage, folder: Path, clients: Path, scale: Scale, trace: int, jobs: int) -> dict[str, Run]:
    sent = azure_slice(trace, scale)
    timed = write_timed_trace(sent, folder / "timed.jsonl")
    mooncake = write_mooncake(sent, folder / "mooncake.jsonl")
    cache = tokenizer_cache(stage.model, folder / "hugging-face")
    mixed = [
        {"at_s": 0.0, "chat": bool(n & 1), "stream": bool(n & 2), "prompt_tokens": 100, "output_tokens": 64}
        for n in range(jobs)
    ]
    written = write_jobs(mixed, folder / "jobs.jsonl")
    return {
        "openai": lambda url, _: openai_figures(run_openai(clients, url, written, concurrency=CONCURRENCY)),
        "vllm bench serve": lambda url, label: run_bench_serve(
            stage.vllm, url, timed, stage.model, requests=trace, folder=_made(folder / label)
        ),
        "aiperf": lambda url, label: run_aiperf(
            clients, url, mooncake, cache, requests=trace, folder=_made(folder / label)
        ),
    }


def compared_table(name: str, rounds: Rounds) -> Table:
    """All ways side by side."""
    direct, again, through = ([each.figures for each in rounds[way]] for way in (DIRECT, AGAIN, THROUGH))
    return Table(caption=f"{name} ({loads(rounds)})", head=HEAD, rows=side_by_side(direct, again, through))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _warm_up(folder: Path) -> Path:
    """vLLM compiles a few things with its first requests."""
    jobs = [
        {"at_s": 0.0, "chat": bool(n & 1), "stream": True, "prompt_tokens": 300, "output_tokens": 40} for n in range(8)
    ]
    return write_jobs(jobs, folder / "warm-up.jsonl")
