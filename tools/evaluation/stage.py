"""One vLLM with the plug-in and a gateway in front of it, while a block lasts; this process keeps off its core.

The engine computes on one core; its API server, the gateway and the clients share the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tools.engines.vllm_server import FLAGS, tiny_model, vllm_server
from tools.evaluation.gateway_process import gateway_process
from tools.evaluation.section import Workshop

UNCACHED = (*FLAGS, "--no-enable-prefix-caching")
"""A prompt that came before costs as much as the first time: rounds are alike."""

KV_BLOCKS = 160
SMALL = (*FLAGS, "--num-gpu-blocks-override", str(KV_BLOCKS))
"""A KV cache that a small load can fill for a good part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Two ways to the same engine. `vllm` is its environment, `model` its folder, `stats` where its steps go."""

    direct: str
    through: str
    vllm: Path
    model: Path
    stats: str


@contextmanager
def on_stage(workshop: Workshop, *, options: Sequence[str] = ()) -> Iterator[Stage]:
    """`options` go to `throttllem serve`. Raises MissingError."""
    with engine_alone(workshop) as alone:
        arguments = ("--engine", alone.direct, "--set", f"engines.0.stats={alone.stats}", *options)
        with gateway_process(arguments, workshop.folder / "gateway") as gateway:
            yield replace(alone, through=gateway.url)


@contextmanager
def engine_alone(workshop: Workshop, *, flags: Sequence[str] = UNCACHED) -> Iterator[Stage]:
    """The engine only: both ways are the direct one."""
    vllm = workshop.environment("vllm")
    model = tiny_model(vllm, workshop.folder / "tiny")
    stats, log = str(workshop.folder / "steps.sock"), workshop.folder / "vllm.log"
    before = os.sched_getaffinity(0)
    environment = {"THROTTLLEM_STATS": stats}
    with vllm_server(vllm, model, log, flags=flags, environment=environment, say=workshop.say) as server:
        os.sched_setaffinity(0, server.cores)
        try:
            yield Stage(direct=server.url, through=server.url, vllm=vllm, model=model, stats=stats)
        finally:
            os.sched_setaffinity(0, before)
