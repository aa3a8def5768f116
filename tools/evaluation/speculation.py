"""A real vLLM that speculates (ngram): tokens, KV blocks and time per token of the gateway against the engine's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from throttllem.engines.capacity import total
from tools.evaluation.scoreboard import errors_of
from tools.testbed.engines.vllm import FLAGS, Vllm, vllm
from tools.testbed.gateway import gateway
from tools.testbed.known_clients import openai_figures, run_openai
from tools.testbed.report import Section, Table, Workspace, version_of

KV_BLOCKS = 160
DRAFT = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SPECULATES = (*FLAGS, "--num-gpu-blocks-override", str(KV_BLOCKS), "--speculative-config", json.dumps(DRAFT))
COUNTS = {"tokens": "vllm:generation_tokens_total", "accepted": "vllm:spec_decode_num_accepted_tokens_total"}
TPOT = "vllm:request_time_per_output_token_seconds"
OWN_TPOT = "gen_ai_server_time_per_output_token_seconds"
TEXT = """\
{requests} streamed requests of {output} tokens, {at_once} at a time, through a gateway in front of vLLM with ngram
speculation of 3 tokens and {blocks} KV blocks. The client asks for usage, which comes with the last event; while a
stream runs, its tokens are counted by the engine's rate. *tokens*: answers' tokens in the gateway's `/metrics` against
`vllm:generation_tokens_total`. *time per token*: mean of the requests, by the gateway's histogram and by vLLM's. *KV*:
blocks at each engine step, in % of the capacity, as in [Scoreboard](scoreboard.md), before the next step; *of what it
holds*: the mean as a part of the blocks in use, of which a request has 1 to 3, so that one block is a tenth of them.
The targets, 1 % of the tokens and 5 % of the others, are not met by this last figure. There is no GPU here: joules per
token are the GPU's joules by these tokens, and were not metered.
"""
OUTPUT_TOKENS, AT_ONCE = 300, 4


def section(workspace: Workspace) -> Section:
    """With and without the plug-in, on the same engine. Raises MissingError where something is not installed."""
    venv, clients, folder = workspace.environment("vllm"), workspace.environment("clients"), workspace.folder
    count = 8 if workspace.quick else 40
    jobs, warm = _jobs(folder, count), _jobs(folder, AT_ONCE)
    found = {}
    with vllm(venv, folder, flags=SPECULATES, report=workspace.report) as engine:
        run_openai(clients, engine.url, warm, concurrency=AT_ONCE)
        for name, plug_in in (("with the plug-in", True), ("without", False)):
            found[name] = _measured(engine, clients, jobs, folder, plug_in=plug_in)
            workspace.report(f"{name}: {found[name]}")
    return Section(
        title="Speculation against the engine's own numbers",
        text=TEXT.format(requests=count, output=OUTPUT_TOKENS, at_once=AT_ONCE, blocks=KV_BLOCKS),
        tables=(
            Table(
                caption="Differences of the gateway from the engine.",
                head=("gateway", "tokens a step", "tokens", "time per token", "KV: mean", "p95", "of what it holds"),
                rows=[_row(name, figures) for name, figures in found.items()],
            ),
        ),
        results=found,
        versions={"vLLM": version_of(venv, "vllm")},
    )


def _row(name: str, figures: Mapping[str, float]) -> tuple[str, ...]:
    shares = [f"{figures[key]:+.2%}" for key in ("tokens", "tpot")]
    kv = [f"{figures[key]:.2f} %" for key in ("kv_mean", "kv_p95", "kv_relative")]
    return (name, f"{figures['rate']:.2f}", *shares, *kv)


def _jobs(folder: Path, count: int) -> Path:
    path = folder / f"speculation-{count}.jsonl"
    job = {"at_s": 0.0, "chat": False, "stream": True, "prompt_tokens": 64, "output_tokens": OUTPUT_TOKENS}
    path.write_text(f"{json.dumps(job)}\n" * count)
    return path


def _measured(engine: Vllm, clients: Path, jobs: Path, folder: Path, *, plug_in: bool) -> dict[str, float]:
    """The differences while the load ran. Raises RuntimeError if a request failed."""
    folder /= f"speculation-{'with' if plug_in else 'without'}"
    out = folder / "steps.jsonl"
    command: list[str | Path] = [sys.executable, "-m", "tools.evaluation.watched_gateway", engine.stats, out]
    command += ["--plug-in", "serve"] if plug_in else ["serve"]
    before = _page(engine.url)
    with gateway(("--engine", engine.url), folder, command=command) as up:
        figures = openai_figures(run_openai(clients, up.url, jobs, concurrency=AT_ONCE))
        if figures.errors:
            raise RuntimeError(f"{figures.errors} requests failed")
        own = _page(up.url)
    after = _page(engine.url)
    tokens, accepted = (_rise(before, after, name) for name in COUNTS.values())
    tpot_s = _rise(before, after, f"{TPOT}_sum") / _rise(before, after, f"{TPOT}_count")
    own_tpot_s = (total(own, f"{OWN_TPOT}_sum") or 0.0) / max(1.0, total(own, f"{OWN_TPOT}_count") or 0.0)
    steps: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()]
    kv = errors_of(steps, later=True)["kv"]
    held = [step["engine"]["kv_blocks"] / step["capacity"] for step in steps if step["engine"]["running"]]
    return {
        "rate": tokens / (tokens - accepted),
        "tokens": (total(own, "throttllem_generated_tokens_total") or 0.0) / tokens - 1,
        "tpot": own_tpot_s / tpot_s - 1,
        "kv_mean": kv["mean"],
        "kv_p95": kv["p95"],
        "kv_relative": kv["mean"] * len(held) / sum(held),
    }


def _page(url: str) -> bytes:
    with urlopen(f"{url}/metrics") as reply:
        page: bytes = reply.read()
    return page


def _rise(before: bytes, after: bytes, name: str) -> float:
    return (total(after, name) or 0.0) - (total(before, name) or 0.0)
