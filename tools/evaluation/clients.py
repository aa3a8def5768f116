"""What clients of others see of vLLM, directly and through the gateway: the same load, in alternation, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.evaluation.figures import HEAD, Figures, as_dicts, side_by_side
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

ROUNDS = 3
CONCURRENCY = 8
SLO = ("--slo-e2e", "30", "--slo-tbt", "0.5")
TEXT = """\
The same load goes to vLLM {vllm} (CPU, a tiny random model) directly and through `throttllem serve` (plug-in on,
promises set, flight recorder on), in alternation, {rounds} rounds each. Figures are medians over the rounds, with the
least and the most in brackets; requests and errors are of all rounds together. TTFT is over requests, ITL over the gaps
between chunks as they reach the client (vLLM's server puts tokens together when it falls behind), TPOT over requests'
means. An answer with another number of tokens than was asked for counts as an error.

vLLM's engine computes on one core. Its API server, the gateway and the client share the other: part of every difference
is that the client has less of it, on a machine with cores to spare it is smaller.

`openai`: {jobs} requests a round, half of them streams, half chats, {concurrency} at once, 64 tokens each.
`vllm bench serve` (timed trace) and `aiperf` (Mooncake trace, fixed schedule): {trace} requests a round, a slice of
Azure's chat trace: {scale}.
"""

Run = Callable[[str, Path], Figures]


def section(workshop: Workshop) -> Section:
    """Run every client against both. Raises MissingError where something is not installed."""
    clients, rounds = workshop.environment("clients"), 1 if workshop.quick else ROUNDS
    scale, trace, jobs = Scale(), 24 if workshop.quick else 80, 24 if workshop.quick else 200
    with on_stage(workshop, options=SLO) as stage:
        run_openai(clients, stage.through, _warm_up(workshop.folder), concurrency=4)
        runs = _runs(stage, workshop.folder, clients, scale, trace, jobs)
        found = {name: _alternate(name, run, stage, workshop, rounds) for name, run in runs.items()}
    tables = []
    for name, (direct, through) in found.items():
        tables.append(Table(caption=f"`{name}`", head=HEAD, rows=side_by_side(direct, through)))
    text = TEXT.format(
        vllm=version_of(stage.vllm, "vllm"),
        rounds=rounds,
        jobs=jobs,
        concurrency=CONCURRENCY,
        trace=trace,
        scale=scale.told(),
    )
    return Section(
        title="Clients of others: directly and through the gateway",
        text=text,
        tables=tuple(tables),
        results={
            "rounds": {
                name: {"direct": as_dicts(direct), "through": as_dicts(through)}
                for name, (direct, through) in found.items()
            }
        },
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
        {"at_s": 0.0, "chat": bool(n & 1), "stream": bool(n & 2), "prompt_tokens": 100, "answer_tokens": 64}
        for n in range(jobs)
    ]
    written = write_jobs(mixed, folder / "jobs.jsonl")
    return {
        "openai": lambda url, _: openai_figures(run_openai(clients, url, written, concurrency=CONCURRENCY)),
        "vllm bench serve": lambda url, there: run_bench_serve(
            stage.vllm, url, timed, stage.model, requests=trace, folder=there
        ),
        "aiperf": lambda url, there: run_aiperf(clients, url, mooncake, cache, requests=trace, folder=there),
    }


def _warm_up(folder: Path) -> Path:
    """vLLM compiles a few things with its first requests."""
    jobs = [
        {"at_s": 0.0, "chat": bool(n & 1), "stream": True, "prompt_tokens": 300, "answer_tokens": 40} for n in range(8)
    ]
    return write_jobs(jobs, folder / "warm-up.jsonl")


def _alternate(
    name: str, run: Run, stage: Stage, workshop: Workshop, rounds: int
) -> tuple[list[Figures], list[Figures]]:
    """Directly and through, in turn; who comes first changes with every round."""
    found: dict[str, list[Figures]] = {stage.direct: [], stage.through: []}
    for number in range(rounds):
        ways = (stage.direct, stage.through)
        for way in ways if number % 2 == 0 else ways[::-1]:
            kind = "directly" if way == stage.direct else "through the gateway"
            folder = workshop.folder / f"{name}-{number}-{kind}".replace(" ", "-")
            folder.mkdir()
            figures = run(way, folder)
            found[way].append(figures)
            workshop.say(
                f"{name}, round {number + 1}, {kind}: {figures.requests} requests, {figures.errors} errors, "
                f"TTFT p50 {figures.ttft_p50_ms or 0:.1f} ms, {figures.tokens_per_s:.0f} tokens/s"
            )
    return found[stage.direct], found[stage.through]
