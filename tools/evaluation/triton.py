"""The real Triton, directly and through the gateway: native streams side by side, and OpenAI's API."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from tools.evaluation.compare import AGAIN, DIRECT, THROUGH, TITLES, Rounds, alternate, as_json, compared_table, medians
from tools.evaluation.identity import Case, compare_all, table_of
from tools.testbed.engines.triton import MODEL, ModelSpeed, Triton, triton
from tools.testbed.figures import Figures, percentiles_ms
from tools.testbed.gateway import gateway
from tools.testbed.known_clients import openai_figures, run_openai
from tools.testbed.report import Section, Table, Workspace, version_of
from tools.testbed.tap import tapped
from tools.testbed.trace import write_jobs

TOKENS = 60
SPEED = ModelSpeed(step_s=0.01, row_s=0.0005, max_rows=16, kv_blocks=512)
ROUNDS = 6
CONCURRENCY = 8
NATIVE = f"/v2/models/{MODEL}"
TEXT = """\
The real Triton server, with a model in its Python backend that speaks TensorRT-LLM's protocol and batches in flight
({step:g} ms a step and {row:g} ms more per request in it); text and speed are made up, requests and bytes are not.

Native streams (`generate_stream`): {requests} requests a round, {concurrency} at once, {tokens} tokens each, directly
and through the gateway in turn, {rounds} rounds each; medians over the rounds, least and most in brackets.
*direct again* is the control: the same way a second time, so what differs between the two is noise of the machine. A
figure is *beyond noise* only if no run through the gateway lies among the direct ones; into others nothing is to be
read.
The server, the gateway and the client share the machine's cores. The `openai` package only works through the gateway:
Triton itself has no such API. *bytes* and *words* of native answers are compared as those of vLLM are. Other POSTs
under `/v2` are refused (405): they would bypass the core.
"""
NATIVE_BODY: dict[str, Any] = {"text_input": "hello there", "max_tokens": 20, "stream": True}


def cases() -> list[Case]:
    """Native requests; the model's words follow from the prompt."""
    one, stream = f"{NATIVE}/generate", f"{NATIVE}/generate_stream"
    whole = NATIVE_BODY | {"stream": False}
    return [
        Case(name="generate", path=one, body=whole),
        Case(name="generate_stream", path=stream, body=NATIVE_BODY),
        Case(
            name="generate_stream, stop words and seed",
            path=stream,
            body=NATIVE_BODY | {"stop_words": ["ve"], "random_seed": 7},
        ),
        Case(name="generate, a model that fails", path=one, body=whole | {"text_input": "fail after 0"}),
        Case(
            name="generate_stream, a model that fails", path=stream, body=NATIVE_BODY | {"text_input": "fail after 3"}
        ),
        Case(name="generate, an input is missing", path=one, body={"text_input": "x"}),
    ]


def section(workspace: Workspace) -> Section:
    """Native and OpenAI requests. Raises MissingError where something is not installed."""
    environment, clients, folder = workspace.environment("triton"), workspace.environment("clients"), workspace.folder
    rounds, requests = (1, 16) if workspace.quick else (ROUNDS, 160)
    with triton(environment, folder, SPEED) as server, tapped(server.url) as tap:
        with gateway(arguments(server, tap.url), folder / "tapped") as up:
            same = asyncio.run(compare_all(cases(), server.url, up.url, tap, workspace.report))
        with gateway(arguments(server, server.url), folder / "gateway") as up:
            native = _native(server, up.url, workspace, rounds, requests)
            openai = _openai(clients, up.url, workspace, rounds, requests)
    compared = table_of(same, f"{sum(each.same for each in same)} of {len(same)} native answers are the same.")
    return Section(
        title="Triton: directly and through the gateway",
        text=TEXT.format(
            step=SPEED.step_s * 1e3,
            row=SPEED.row_s * 1e3,
            requests=requests,
            concurrency=CONCURRENCY,
            tokens=TOKENS,
            rounds=rounds,
        ),
        tables=(compared_table("`generate_stream`", native), _alone(openai), compared),
        results={
            "native": as_json(native),
            "openai": [asdict(each) for each in openai],
            "cases": [each.as_dict() for each in same],
        },
        versions={
            "nvidia-pytriton": version_of(environment, "nvidia-pytriton"),
            "openai": version_of(clients, "openai"),
        },
    )


def arguments(server: Triton, url: str) -> tuple[str, ...]:
    """Of `serve` in front of it."""
    return ("--triton", url, "--set", f"engines.0.metrics_url={server.metrics_url}")


def _native(server: Triton, through: str, workspace: Workspace, rounds: int, requests: int) -> Rounds:
    path = f"{NATIVE}/generate_stream"

    def run(url: str, _: str) -> Figures:
        return asyncio.run(run_native(url, path, requests=requests, concurrency=CONCURRENCY))

    for url in (server.url, through):
        run(url, "warm-up")
    urls = {DIRECT: server.url, AGAIN: server.url, THROUGH: through}
    return alternate("native", run, urls, rounds, workspace.report)


def jobs(count: int) -> list[dict[str, Any]]:
    """Jobs of `openai_client.py`: half streams, a quarter chats, answers of exactly `TOKENS` tokens."""
    common = {"at_s": 0.0, "text": True, "prompt_tokens": 40, "output_tokens": TOKENS, "extra": {"min_tokens": TOKENS}}
    return [common | {"chat": n % 4 < 1, "stream": n % 2 == 0} for n in range(count)]


def _openai(clients: Path, url: str, workspace: Workspace, rounds: int, requests: int) -> list[Figures]:
    written, found = write_jobs(jobs(requests), workspace.folder / "triton.jsonl"), []
    for number in range(rounds):
        found.append(openai_figures(run_openai(clients, url, written, concurrency=CONCURRENCY, model=MODEL)))
        workspace.report(f"openai, round {number + 1}: {found[-1].requests} requests, {found[-1].errors} errors")
    return found


def _alone(rounds: list[Figures]) -> Table:
    middle = medians(rounds)
    cells = [getattr(middle, name) for name in TITLES]
    row = [f"{cell:,.2f}" if isinstance(cell, float) else f"{cell:,}" for cell in cells]
    return Table(caption="`openai` through the gateway, medians", head=tuple(TITLES.values()), rows=[row])


# ---- native streams -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    ttfts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    means_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: int = 0


async def run_native(url: str, path: str, *, requests: int, concurrency: int) -> Figures:
    """Figures of `requests` streams of `TOKENS` tokens."""
    seen, left, began = _Seen(), iter(range(requests)), time.perf_counter()

    async def one_after_another(session: aiohttp.ClientSession) -> None:
        for number in left:
            await _stream(session, f"{url}{path}", number, seen)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        await asyncio.gather(*(one_after_another(session) for _ in range(concurrency)))
    wall_s = time.perf_counter() - began
    ttft, itl = percentiles_ms(seen.ttfts_s), percentiles_ms(seen.gaps_s)
    return Figures(
        requests=requests - seen.errors,
        errors=seen.errors,
        ttft_p50_ms=ttft[0],
        ttft_p99_ms=ttft[1],
        itl_p50_ms=itl[0],
        itl_p99_ms=itl[1],
        tpot_p50_ms=percentiles_ms(seen.means_s)[0],
        tokens_per_s=seen.tokens / wall_s,
    )


async def _stream(session: aiohttp.ClientSession, url: str, number: int, seen: _Seen) -> None:
    body = {"text_input": f"question {number}", "max_tokens": TOKENS, "min_length": TOKENS, "stream": True}
    sent, times = time.perf_counter(), []
    async with session.post(url, json=body) as response:
        async for line in response.content:
            if line.startswith(b"data:"):
                times.append(time.perf_counter())
    if response.status != 200 or len(times) != TOKENS:
        seen.errors += 1
        return
    seen.tokens += len(times)
    seen.ttfts_s.append(times[0] - sent)
    seen.gaps_s += [after - before for before, after in pairwise(times)]
    seen.means_s.append((times[-1] - times[0]) / (len(times) - 1))
