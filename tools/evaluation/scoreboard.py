"""How well the gateway knows what runs in a real vLLM: its numbers against the engine's own, at every engine step."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.testbed.engines.vllm import FLAGS, Vllm, vllm
from tools.testbed.gateway import gateway
from tools.testbed.known_clients import openai_figures, run_openai
from tools.testbed.report import Section, Table, Workspace, version_of
from tools.testbed.trace import Scale, Sent, azure_slice, write_jobs

KV_BLOCKS = 160
SMALL = (*FLAGS, "--num-gpu-blocks-override", str(KV_BLOCKS))
"""A KV cache that a small load can fill for a good part."""
SCALE = Scale(rate=14.0)
TEXT = """\
{requests} requests (a slice of Azure's chat trace: {scale}; half of them chats, three of four streamed) through a
gateway in front of vLLM with {blocks} KV blocks of 128 tokens and its prefix cache on. At each engine step the numbers
of the engine (from its stat logger; {with_steps:,} and {without_steps:,} steps with requests in it) are held against
those of the gateway's core at that time; both clocks are the machine's monotonic one.

*with the plug-in*: the gateway gets each step after its numbers were taken down. *without*: it counts tokens in
streams, knows nothing of answers that are not streamed until they end, and looks at `/metrics` twice a second.
*estimate*: the scoreboard's own. *corrected*: plus the offset on which the engine's last three reports agree, which the
core's projections use. *before the next step*: what the gateway knew of a step when the next one had ended. *at once*:
what it knew in the moment in which the step ended, before any report could arrive.

*in the engine*: running and waiting requests, against those that the gateway has sent there; those on their way through
vLLM's API server are the difference. *running*: the engine counts a prompt under way, the gateway only requests that
have a token, as far as it can see (without the plug-in, none that is not streamed). *KV*: blocks, in % of the capacity,
likewise. The offset does not separate what runs from what waits, so *running* has no corrected error.
*KV unexplained*: the part of it that those requests, whose blocks the projections count as well, cannot explain.

A difference counts once three looks in a row show it. A single look may catch engine and gateway at different moments;
without the plug-in such an offset held for half a second and made the error of KV larger by a quarter to a half. The
correction is for what lasts: requests of others, prompts that share blocks.
"""


def section(workspace: Workspace) -> Section:
    """With and without the plug-in, on the same engine. Raises MissingError where something is not installed."""
    venv, clients, folder = workspace.environment("vllm"), workspace.environment("clients"), workspace.folder
    jobs = _jobs(folder, 40 if workspace.quick else 600)
    with vllm(venv, folder, flags=SMALL, report=workspace.report) as engine:
        found = {}
        for name, plug_in in (("with the plug-in", True), ("without", False)):
            run_openai(clients, engine.url, _jobs(folder, 8), concurrency=8)
            found[name] = watched(engine, clients, jobs, folder, plug_in=plug_in)
            workspace.report(f"{name}: {len(found[name]):,} steps")
    rows, errors = [], {}
    for name, samples in found.items():
        for title, later in (("before the next step", True), ("at once", False)):
            errors[f"{name}, {title}"] = judged = errors_of(samples, later=later)
            rows += [(name, title, *row) for row in _rows(judged)]
    text = TEXT.format(
        requests=len(jobs.read_text().splitlines()),
        scale=SCALE.words(),
        blocks=KV_BLOCKS,
        with_steps=len(_busy(found["with the plug-in"])),
        without_steps=len(_busy(found["without"])),
    )
    head = (
        "gateway",
        "",
        "",
        "in the engine: mean",
        "p95",
        "running: mean",
        "p95",
        "KV: mean",
        "p95",
        "KV unexplained: mean",
        "p95",
    )
    return Section(
        title="The scoreboard against the engine's own numbers",
        text=text,
        tables=(Table(caption=_load(found), head=head, rows=rows),),
        results={"errors": errors, "steps": found},
        versions={"vLLM": version_of(venv, "vllm")},
    )


def errors_of(samples: Sequence[Mapping[str, Any]], *, later: bool) -> dict[str, dict[str, float]]:
    """Absolute errors: sequences and % of the KV capacity, by name, mean and p95, over steps with requests."""
    pairs = list(zip(samples, samples[1:] if later else samples, strict=False))
    pairs = [(one, known) for one, known in pairs if one["engine"]["running"] + one["engine"]["waiting"]]
    engine, own = [one["engine"] for one, _ in pairs], [known["gateway"] for _, known in pairs]
    scale = 100 / samples[0]["capacity"]
    offsets = np.array([(known["others"]["batch"], known["others"]["kv_blocks"]) for _, known in pairs])
    inside = np.array(
        [a["running"] + a["waiting"] - b["running"] - b["pending"] for a, b in zip(engine, own, strict=True)]
    )
    running = np.array([a["running"] - b["running"] for a, b in zip(engine, own, strict=True)])
    blocks = np.array([a["kv_blocks"] - b["kv_blocks"] for a, b in zip(engine, own, strict=True)])
    under_way = np.array([each["pending_blocks"] for each in own])
    return {
        "inside": _mean_p95(inside),
        "running": _mean_p95(running),
        "kv": _mean_p95(blocks * scale),
        "unexplained": _mean_p95(_beyond(blocks, under_way) * scale),
        "inside corrected": _mean_p95(inside - offsets[:, 0]),
        "kv corrected": _mean_p95((blocks - offsets[:, 1]) * scale),
        "unexplained corrected": _mean_p95(_beyond(blocks - offsets[:, 1], under_way) * scale),
    }


def _beyond(blocks: Any, under_way: Any) -> Any:
    """What is outside 0 to `under_way`."""
    return blocks - np.clip(blocks, 0, under_way)


def _mean_p95(errors: Any) -> dict[str, float]:
    sizes = np.abs(errors)
    return {"mean": float(sizes.mean()), "p95": float(np.percentile(sizes, 95))}


def _rows(judged: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    def row(title: str, suffix: str) -> tuple[str, ...]:
        inside = [f"{judged[f'inside{suffix}'][figure]:.2f}" for figure in ("mean", "p95")]
        running = ["" if suffix else f"{judged['running'][figure]:.2f}" for figure in ("mean", "p95")]
        shares = [judged[f"{name}{suffix}"][figure] for name in ("kv", "unexplained") for figure in ("mean", "p95")]
        return (title, *inside, *running, *(f"{share:.2f} %" for share in shares))

    return [row("estimate", ""), row("corrected", " corrected")]


def _load(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How full the engine was, in words."""
    busy = [sample for samples in found.values() for sample in _busy(samples)]
    running = [sample["engine"]["running"] for sample in busy]
    filled = [sample["engine"]["kv_blocks"] / sample["capacity"] for sample in busy]
    return (
        f"Absolute errors. The engine ran {np.mean(running):.1f} requests on average ({max(running)} at most) and held "
        f"{np.mean(filled):.0%} of its KV cache ({max(filled):.0%} at most)."
    )


def _busy(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [sample for sample in samples if sample["engine"]["running"] + sample["engine"]["waiting"]]


def mixed(sent: Sequence[Sent]) -> list[dict[str, Any]]:
    """Jobs of `openai_client.py`: half chats, three of four streamed."""
    return [
        {
            "at_s": each.at_s,
            "chat": number % 2 == 0,
            "stream": number % 4 != 1,
            "prompt_tokens": each.prompt_tokens,
            "output_tokens": each.output_tokens,
        }
        for number, each in enumerate(sent)
    ]


def _jobs(folder: Path, count: int) -> Path:
    return write_jobs(mixed(azure_slice(count, SCALE, skip=500)), folder / f"mixed-{count}.jsonl")


def watched(engine: Vllm, clients: Path, jobs: Path, folder: Path, *, plug_in: bool) -> list[dict[str, Any]]:
    """Both sides' numbers at every step while the load ran. Raises RuntimeError if a request failed."""
    folder /= f"gateway-{'with' if plug_in else 'without'}"
    out = folder / "steps.jsonl"
    command: list[str | Path] = [sys.executable, "-m", "tools.evaluation.watched_gateway", engine.stats, out]
    command += ["--plug-in", "serve"] if plug_in else ["serve"]
    with gateway(("--engine", engine.url), folder, command=command) as up:
        figures = openai_figures(run_openai(clients, up.url, jobs, concurrency=64))
        if figures.errors:
            raise RuntimeError(f"{figures.errors} of {figures.requests + figures.errors} requests failed")
    return [json.loads(line) for line in out.read_text().splitlines()]
