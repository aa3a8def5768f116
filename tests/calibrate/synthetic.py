"""An unknown GPU: the A100's constants moved at random, and measurements of it with scatter."""

from __future__ import annotations

import numpy as np
import polars as pl

from throttllem.calibrate.calibration import errors
from throttllem.calibrate.fit import with_constants
from throttllem.calibrate.points import Point
from throttllem.calibrate.prior import around, priors
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model

CATALOGUE = Catalogue.load()
# The shipped A100's constants move with every fit of it; these stay.
_PINNED = {
    "time.host_s": 1.5e-3, "time.host_request_s": 33e-6, "time.memory_knee_mhz": 880.0, "time.memory_sharpness": 16.5,
    "time.compute_clock_share": 0.97, "time.latency_clock_share": 0.56, "power.idle_w": 55.0, "power.static_w": 130.0,
    "power.memory_w": 61.0, "power.core_w": 210.0, "power.compute_w": 163.0, "power.knee_mhz": 1140.0,
    "power.voltage_rise": 1.07, "power.voltage_exponent": 1.5,
}  # fmt: skip
# Few clocks to choose from: an engine's table of clocks is most of what a small fit costs.
LIKE = with_constants(CATALOGUE.gpus["a100-40gb-sxm"], _PINNED).model_copy(update={"clock_step_mhz": 150})
MODEL = CATALOGUE.models["llama-3-8b"]
CLOCKS = (405, 660, 900, 1155, 1410)
BATCHES = (1, 4, 24, 128)


def changed_gpu(seed: int) -> tuple[Gpu, dict[str, float]]:
    """The GPU, and where each of its constants lies. Constants that are zero stay so."""
    rng = np.random.default_rng(seed)
    moved = {}
    for constant in around(LIKE, priors(LIKE), LIKE):
        value = constant.start * float(np.exp(rng.normal(0.0, 0.5 * constant.spread)))
        moved[constant.path] = min(max(value, 1.02 * constant.low), 0.98 * constant.high)
    return with_constants(LIKE, moved), moved


def measure(
    gpu: Gpu,
    *,
    clocks: tuple[int, ...] = CLOCKS,
    batches: tuple[int, ...] = BATCHES,
    sizes: tuple[int, ...] = (1, 2),
    repeats: int = 1,
    scatter: tuple[float, float] = (0.03, 0.04),
    seed: int = 0,
    model: Model = MODEL,
) -> list[Point]:
    """Every clock, batch and size: decode alone at two contexts, and with a prompt beside it."""
    rng = np.random.default_rng(seed)
    points = []
    for tp in sizes:
        physics = EnginePhysics(gpu, model, tp)
        for clock in clocks:
            for batch in batches:
                for context, prompt in ((100, 0), (900, 0), (400, 60), (400, 1500)) * repeats:
                    tokens = prompt and int(prompt * rng.uniform(0.7, 1.4))
                    rows = batch - (tokens > 0)
                    arguments = (clock, rows, int(rows * context * rng.uniform(0.7, 1.4)), tokens, tokens**2 / 2)
                    law = physics.iteration(*arguments) * np.exp(rng.normal(0.0, scatter))
                    points.append(Point(len(points), tp, batch, *arguments, *law.tolist()))
    return points


def frame(points: list[Point], gpu: str = "new-gpu", model: str = MODEL.name, block: int = 16) -> pl.DataFrame:
    """The points in the profile format; whole blocks, so KV tokens may differ by half a block a request."""
    rows = [
        {
            "gpu": gpu,
            "model": model,
            "tp": point.tp,
            "block_tokens": block,
            "batch": point.batch,
            "kv_blocks": max(
                1, -(-point.kv_tokens // block) + point.decode_batch // 2 - (-point.prefill_tokens // block)
            ),
            "clock_mhz": point.clock_mhz,
            "prefill_tokens": point.prefill_tokens,
            "seconds": point.seconds,
            "watts": point.watts,
        }
        for point in points
    ]
    return pl.DataFrame(rows)


def truth_errors(found: Gpu, true: Gpu, points: list[Point]) -> np.ndarray:
    """Of one GPU's law against the other's, without scatter; one line per point: seconds, watts."""
    return (1 + errors(found, MODEL, points)) / (1 + errors(true, MODEL, points)) - 1
