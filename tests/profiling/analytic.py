"""An engine simple enough to check by hand: a roofline of three terms and a power law."""

from __future__ import annotations

import polars as pl

from throttllem.core.types import EngineSpec
from throttllem.profiling.measure import ProfilePlan, profile_engine


class AnalyticEngine:
    def __init__(self, tp: int) -> None:
        self.tp = tp

    def iteration(
        self, clock_mhz: float, decode_batch: int, kv_tokens: int, prefill_tokens: int, prefill_pairs: float
    ) -> tuple[float, float]:
        speed = clock_mhz / 1410
        memory = (0.010 + 1e-6 * kv_tokens) / self.tp
        arithmetic = (5e-5 * (decode_batch + prefill_tokens) + 1e-9 * prefill_pairs) / self.tp / speed
        return 0.003 + memory + arithmetic, self.tp * (60 + 100 * speed + 150 * speed**3)


def spec(tp: int, **changes: object) -> EngineSpec:
    values: dict[str, object] = {
        "gpu": "test-gpu",
        "model": "test-model",
        "tp": tp,
        "kv_blocks": 300 * tp,
        "block_tokens": 16,
        "max_batch": 32,
        "max_context_tokens": 2048,
        "prefill_budget_tokens": 2048,
        "chunked": False,
        "no_evict": True,
        "clocks_mhz": tuple(range(210, 1411, 75)),
        "idle_w": 50.0,
        "startup_s": 20.0,
    }
    return EngineSpec(**(values | changes))


def profile(rows: int = 3000, sizes: tuple[int, ...] = (1, 2), **plan: float) -> pl.DataFrame:
    chosen = ProfilePlan(rows=rows, **plan)
    return pl.concat([profile_engine(AnalyticEngine(tp), spec(tp), chosen) for tp in sizes])
