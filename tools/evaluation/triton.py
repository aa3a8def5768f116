"""The real Triton, directly and through the gateway: native streams side by side, and OpenAI's API."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tools.engines.triton_server import MODEL, ModelSpeed, TritonServer, triton_server
from tools.evaluation.alternate import AGAIN, DIRECT, THROUGH, Rounds, alternate, as_json
from tools.evaluation.bodies import Case
from tools.evaluation.clients import compared_table
from tools.evaluation.figures import TITLES, Figures, as_dicts, medians
from tools.evaluation.gateway_process import gateway_process
from tools.evaluation.identity import compare_all, table_of
from tools.evaluation.known_clients import openai_figures, run_openai
from tools.evaluation.machine import version_of
from tools.evaluation.native_stream import TOKENS, run_native
from tools.evaluation.section import Section, Table, Workshop
from tools.evaluation.tap import tapped
from tools.evaluation.trace import write_jobs

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


def section(workshop: Workshop) -> Section:
    """Native and OpenAI requests. Raises MissingError where something is not installed."""
    environment, clients = workshop.environment("triton"), workshop.environment("clients")
    rounds, requests = (1, 16) if workshop.quick else (ROUNDS, 160)
    with triton_server(environment, SPEED) as server, tapped(server.url) as tap:
        arguments = ("--triton", tap.url, "--set", f"engines.0.metrics_url={server.metrics_url}")
        with gateway_process(arguments, workshop.folder / "tapped") as gateway:
            same = asyncio.run(compare_all(cases(), server.url, gateway.url, tap, workshop.say))
        arguments = ("--triton", server.url, *arguments[2:])
        with gateway_process(arguments, workshop.folder / "gateway") as gateway:
            native = _native(server, gateway.url, workshop, rounds, requests)
            openai = _openai(clients, gateway.url, workshop, rounds, requests)
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
            "openai": as_dicts(openai),
            "cases": [each.as_dict() for each in same],
        },
        versions={
            "nvidia-pytriton": version_of(environment, "nvidia-pytriton"),
            "openai": version_of(clients, "openai"),
        },
    )


def _native(server: TritonServer, through: str, workshop: Workshop, rounds: int, requests: int) -> Rounds:
    path = f"{NATIVE}/generate_stream"

    def run(url: str, _: str) -> Figures:
        return asyncio.run(run_native(url, path, requests=requests, concurrency=CONCURRENCY))

    for url in (server.url, through):
        run(url, "warm-up")
    urls = {DIRECT: server.url, AGAIN: server.url, THROUGH: through}
    return alternate("native", run, urls, rounds, workshop.say)


def jobs(count: int) -> list[dict[str, Any]]:
    """Jobs of `openai_client.py`: half streams, a quarter chats, answers of exactly `TOKENS` tokens."""
    common = {"at_s": 0.0, "text": True, "prompt_tokens": 40, "output_tokens": TOKENS, "extra": {"min_tokens": TOKENS}}
    return [common | {"chat": n % 4 < 1, "stream": n % 2 == 0} for n in range(count)]


def _openai(clients: Path, url: str, workshop: Workshop, rounds: int, requests: int) -> list[Figures]:
    written, found = write_jobs(jobs(requests), workshop.folder / "triton.jsonl"), []
    for number in range(rounds):
        found.append(openai_figures(run_openai(clients, url, written, concurrency=CONCURRENCY, model=MODEL)))
        workshop.say(f"openai, round {number + 1}: {found[-1].requests} requests, {found[-1].errors} errors")
    return found


def _alone(rounds: list[Figures]) -> Table:
    middle = medians(rounds)
    cells = [getattr(middle, name) for name in TITLES]
    row = [f"{cell:,.2f}" if isinstance(cell, float) else f"{cell:,}" for cell in cells]
    return Table(caption="`openai` through the gateway, medians", head=tuple(TITLES.values()), rows=[row])
