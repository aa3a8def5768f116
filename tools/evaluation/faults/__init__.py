"""The catalogue of faults: every fault on real processes, what the clients saw, and what was left behind.

`tests/real/test_faults.py` runs the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tools.evaluation.endurance import WARM, Endured, endure
from tools.evaluation.faults import clients, engines, garbage, gateways
from tools.evaluation.faults.bed import Bed, Fault, Found, RealEngine
from tools.testbed.engines.vllm import tiny_model
from tools.testbed.report import Section, Table, Workspace, version_of

FAULTS: tuple[Fault, ...] = (
    *engines.FAULTS[:-1],
    *gateways.ON_ENGINE,
    *clients.FAULTS,
    engines.full,
    *garbage.FAULTS,
    *gateways.ALONE,
)
"""In an order in which few engines are started."""
REQUESTS = 50_000

TEXT = """
Every fault was done to real processes: `throttllem serve`, and behind it a real vLLM on the CPU (for garbage a server
that answers it, for port and disk the embedded simulated engine, for the lost GPU a fake NVML). Each request must end
exactly once, with all its tokens or with an error in OpenAI's shape, within a bounded time. Afterwards a fresh request
must be served, and nothing may be left: requests that wait or run, in the gateway or by the engine's own count; objects
of the gateway's classes, asyncio tasks and file descriptors beyond those before; and no task may have ended.
Two exceptions: a gateway that is killed can only break its connections off, and what an engine answers as whole HTTP
passes as it is, JSON or not. `tests/real/test_faults.py` runs the same, also on a small engine without vLLM.
"""


def section(workspace: Workspace) -> Section:
    """Every fault, then the endurance run."""
    environment = workspace.environment("vllm")
    model = tiny_model(environment, workspace.folder / "tiny")
    engine = RealEngine(environment=environment, model_folder=model, folder=workspace.folder, report=workspace.report)
    bed = Bed(kind=engine, folder=workspace.folder, report=workspace.report)
    faults = FAULTS[-2:] if workspace.quick else FAULTS
    found = asyncio.run(_tried(bed, faults))
    requests = REQUESTS // 25 if workspace.quick else REQUESTS
    endured = asyncio.run(endure(workspace.folder / "endurance", requests, workspace.report))
    rows = [(one.fault, one.client, one.left) for one in found]
    return Section(
        title="Faults",
        text=TEXT,
        tables=(
            Table(caption="", head=("fault", "what the client saw", "what was left behind"), rows=rows),
            _endurance(endured),
        ),
        results={
            "faults": rows,
            "endurance": {"answers": endured.answers, "samples": endured.samples, "left": endured.left},
        },
        versions={"vllm": version_of(environment, "vllm")},
    )


async def _tried(bed: Bed, faults: Sequence[Fault]) -> list[Found]:
    found: list[Found] = []
    try:
        for fault in faults:
            began = time.monotonic()
            try:
                found += await fault(bed)
            except AssertionError as error:
                found.append(Found(fault=fault.__doc__ or fault.__name__, client=f"BROKEN: {error}", left="unknown"))
            bed.report(f"{found[-1]}: {time.monotonic() - began:.0f} s")
    finally:
        await bed.stop()
    return found


def _endurance(endured: Endured) -> Table:
    figures = (
        ("resident memory, MiB", "resident_bytes", 2**20),
        ("asyncio tasks", "tasks", 1),
        ("file descriptors", "descriptors", 1),
    )
    rows = []
    for name, key, unit in figures:
        first, last, slope = endured.decile(key, 0) / unit, endured.decile(key, -1) / unit, endured.slope(key) / unit
        rows.append((name, f"{first:,.1f}", f"{last:,.1f}", f"{slope * 10_000:+,.2f}"))
    early, late = endured.left
    grown = (late - early) / ((1 - WARM) * endured.requests) * 10_000
    rows.append(("Python objects that a collection leaves", f"{early:,}", f"{late:,}", f"{grown:+,.0f}"))
    answers = ", ".join(f"{count:,} x {outcome}" for outcome, count in sorted(endured.answers.items()))
    return Table(
        caption=(
            f"{endured.requests:,} short requests in {endured.seconds:.0f} s on a small engine: {answers}. "
            "The first half of them is warm-up (what is learned of callers stays, up to a bound). Over the other half:"
        ),
        head=("held by the gateway", "first tenth", "last tenth", "growth per 10,000 requests"),
        rows=rows,
    )
