"""The law against measurements; every bound is a little above the error that was found (docs/physics.md)."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.clock import clock_scale
from throttllem.physics.engine import EnginePhysics

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
CATALOGUE = Catalogue.load()
OPERATORS = {"a100_sxm": ("a100-40gb-sxm", 2.039e12), "h100_sxm": ("h100-80gb-sxm", 3.35e12)}
"""Folder, catalogue name, and memory bandwidth of the part that was measured (the A100 is the 80 GB one)."""

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the reference data (../shared/data) is not here")


def bare(gpu: Gpu, bandwidth: float) -> Gpu:
    """That GPU without host, norms and power limit, and with the memory that was measured: what operators add up to."""
    law = gpu.time.model_copy(update={"host_s": 0.0, "host_request_s": 0.0, "layer_kernel_s": 0.0})
    power = gpu.power.model_copy(update={"limit_w": 1e6})
    return gpu.model_copy(update={"time": law, "power": power, "bandwidth_bytes_per_s": bandwidth})


class Operators:
    """Sums of measured operator latencies; GEMM widths between measured ones by a straight line."""

    def __init__(self, folder: str) -> None:
        at = DATA / "operators" / folder
        gemm = pl.read_parquet(at / "gemm_perf.parquet").filter(pl.col("gemm_dtype") == "bfloat16")
        self.gemm = {
            (m, n, k): t for m, n, k, t in gemm.group_by("m", "n", "k").agg(pl.col("latency").median()).iter_rows()
        }
        self.widths = sorted({n for _, n, _ in self.gemm if n >= 512})
        self.decode = self._attention(at / "generation_attention_perf.parquet", "step")
        self.prefill = self._attention(at / "context_attention_perf.parquet", "isl")
        reduce = pl.read_parquet(at / "custom_allreduce_perf.parquet").filter(pl.col("backend") == "vllm_graph")
        self.reduce = {(n, size): t for n, size, t in reduce.select("num_gpus", "message_size", "latency").iter_rows()}

    @staticmethod
    def _attention(path: Path, length: str) -> dict[tuple[int, ...], float]:
        frame = pl.read_parquet(path).filter((pl.col("head_dim") == 128) & (pl.col("kv_cache_dtype") == "bfloat16"))
        if "window_size" in frame.columns:
            frame = frame.filter((pl.col("window_size") == 0) & (pl.col("kernel_source") == "vllm_flash_attn_fa3"))
        keys = ["num_heads", "num_key_value_heads", "batch_size", length]
        return {tuple(row[:4]): row[4] for row in frame.group_by(keys).agg(pl.col("latency").median()).iter_rows()}

    def matrix(self, m: int, n: int, k: int) -> float:
        corners = product(self._near(n), self._near(k))
        return sum(self.gemm[m, n_at, k_at] * n_part * k_part for (n_at, n_part), (k_at, k_part) in corners)

    def _near(self, width: int) -> list[tuple[int, float]]:
        if width in self.widths:
            return [(width, 1.0)]
        high = min((w for w in self.widths if w > width), default=self.widths[-1])
        low = self.widths[self.widths.index(high) - 1]
        share = (width - low) / (high - low)
        return [(low, 1 - share), (high, share)]

    def layer_ms(self, model_name: str, tp: int, m: int) -> float:
        model = CATALOGUE.model(model_name)
        heads, kv_heads = model.heads // tp, model.kv_heads // tp
        matrices = (
            self.matrix(m, (heads + 2 * kv_heads) * 128, model.hidden)
            + self.matrix(m, model.hidden, heads * 128)
            + self.matrix(m, 2 * model.intermediate // tp, model.hidden)
            + self.matrix(m, model.hidden, model.intermediate // tp)
        )
        return matrices + (2 * self.reduce[tp, m * model.hidden] if tp > 1 else 0.0)


def composition_errors(folder: str) -> list[float]:
    """Relative error of whole decode and prefill iterations against the sum of their measured operators."""
    operators, (name, bandwidth), errors = Operators(folder), OPERATORS[folder], []
    for model_name, tp in (("llama-3-8b", 1), ("llama-3-8b", 2), ("llama-3-70b", 4), ("llama-3-70b", 8)):
        model = CATALOGUE.model(model_name)
        engine = EnginePhysics(bare(CATALOGUE.gpu(name), bandwidth), model, tp)
        heads, kv_heads, top = model.heads // tp, model.kv_heads // tp, engine.gpu.clock_max_mhz
        for batch, context in product((1, 8, 32, 64, 128), (255, 1023, 2047)):
            measured = operators.layer_ms(model_name, tp, batch) + operators.decode[heads, kv_heads, batch, context]
            total = model.layers * measured + operators.matrix(batch, model.vocabulary // tp, model.hidden)
            errors.append(engine.iteration(top, batch, batch * (context + 1), 0, 0.0)[0] * 1e3 / total - 1)
        for prompt in (256, 512, 1024, 2048, 4096):
            measured = operators.layer_ms(model_name, tp, prompt) + operators.prefill[heads, kv_heads, 1, prompt]
            total = model.layers * measured + operators.matrix(1, model.vocabulary // tp, model.hidden)
            errors.append(engine.iteration(top, 0, 0, prompt, prompt**2 / 2)[0] * 1e3 / total - 1)
    return errors


@pytest.mark.parametrize("folder", ["a100_sxm", "h100_sxm"])
def test_operators_add_up(folder: str) -> None:
    errors = np.abs(composition_errors(folder))
    print(f"{folder}: median {np.median(errors):.1%}, p90 {np.quantile(errors, 0.9):.1%}, worst {errors.max():.1%}")
    assert np.median(errors) < 0.10
    assert np.quantile(errors, 0.9) < 0.25


def a100_sweep() -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    frame = pl.read_csv(DATA / "measured" / "a100_40gb_llama3_8b_clock_batch.csv")
    engine = EnginePhysics(CATALOGUE.gpu("a100-40gb-pcie"), CATALOGUE.model("llama-3-8b"), 1)
    ours = [
        engine.iteration(clock, batch, 400 * batch, 0, 0.0)
        for clock, batch in frame.select("clock_mhz", "batch").iter_rows()
    ]
    return frame, np.array([t for t, _ in ours]), np.array([w for _, w in ours])


def test_a100_slow_down_by_clock() -> None:
    frame, seconds, _ = a100_sweep()
    logs = np.log(seconds / frame["batch_latency_s"].to_numpy())
    batches = frame["batch"].to_numpy()
    errors = np.abs([log - np.median(logs[batches == batch]) for log, batch in zip(logs, batches, strict=True)])
    print(f"A100 slow-down: median {np.median(errors):.1%}, worst {errors.max():.1%}")
    assert np.median(errors) < 0.03
    assert errors.max() < 0.10


def test_a100_watts() -> None:
    frame, _, watts = a100_sweep()
    errors = np.abs(watts / frame["gpu_power_w"].to_numpy() - 1)
    print(f"A100 watts: median {np.median(errors):.1%}, worst {errors.max():.1%}")
    assert np.median(errors) < 0.06
    assert errors.max() < 0.12


@pytest.mark.parametrize("kernel", ["babelstream", "pi-solver"])
def test_kernels_follow_the_shape_of_the_power_curve(kernel: str) -> None:
    frame = pl.read_csv(DATA / "measured" / "a100_kernels_clock_power_limit.csv")
    frame = frame.filter((pl.col("kernel") == kernel) & (pl.col("power_limit_w") == 300)).sort("clock_mhz")
    gpu = CATALOGUE.gpu("a100-40gb-pcie")
    scales = [clock_scale(gpu.time, gpu.power, clock, 1410) for clock in frame["clock_mhz"]]
    switching = np.array([scale.switching for scale in scales])
    watts = frame["mean_power_w"].to_numpy()
    slope, base = np.polyfit(switching, watts, 1)
    assert 30 < base < 120
    assert np.abs((base + slope * switching) / watts - 1).max() < 0.04
    if kernel == "babelstream":
        assert frame["bandwidth_gb_s"].min() > 0.99 * frame["bandwidth_gb_s"].max()
        assert scales[0].memory < 1.10


def test_the_power_limit_costs_the_time_of_the_clock_that_it_leaves() -> None:
    """The compute-bound kernel at 1,410 MHz: its time at each limit from its power curve alone."""
    frame = pl.read_csv(DATA / "measured" / "a100_kernels_clock_power_limit.csv").filter(
        pl.col("kernel") == "pi-solver"
    )
    gpu = CATALOGUE.gpu("a100-40gb-pcie")
    free = frame.filter((pl.col("power_limit_w") == 300) & (pl.col("clock_mhz") < 1400))

    def switching(clock: float) -> float:
        return clock_scale(gpu.time, gpu.power, clock, 1410).switching

    slope, base = np.polyfit([switching(clock) for clock in free["clock_mhz"]], free["mean_power_w"].to_numpy(), 1)
    seconds_mhz = float((free["time_s"] * free["clock_mhz"]).mean())
    limited = frame.filter((pl.col("clock_mhz") == 1410) & pl.col("power_limit_w").is_between(150, 300))
    grid = np.arange(1005.0, 1411.0)
    curve = base + slope * np.array([switching(clock) for clock in grid])
    for limit_w, seconds in limited.select("power_limit_w", "time_s").iter_rows():
        left_mhz = float(np.interp(limit_w, curve, grid))
        assert seconds_mhz / left_mhz == pytest.approx(seconds, rel=0.03)


def steady_state(engine: EnginePhysics, clock: int, requests_per_s: float) -> tuple[float, float]:
    """Mean seconds per token and watts at a load of 1,023 tokens in, 99 out: each prompt rides in one iteration.

    The batch is the fixed point of Little's law; with a Poisson number of requests, e^-batch of the time is idle.
    """
    low, high = 0.05, 400.0
    for _ in range(40):
        batch = math.sqrt(low * high)
        rows = max(1, round(batch))
        kv = int(max(1.0, batch) * 1072)
        plain_s, plain_w = engine.iteration(clock, rows, kv, 0, 0.0)
        mixed_s, mixed_w = engine.iteration(clock, rows, kv, 1023, 1023**2 / 2)
        left = 1 - requests_per_s * (mixed_s - plain_s)
        mean_s = plain_s / left if left > 0 else math.inf
        low, high = (batch, high) if 99 * requests_per_s * mean_s > batch and left > 0 else (low, batch)
    mixed = requests_per_s * mean_s
    busy_w = ((1 - mixed) * plain_s * plain_w + mixed * mixed_s * mixed_w) / mean_s
    idle = math.exp(-batch)
    return mean_s, (1 - idle) * busy_w + idle * engine.idle_w()


def test_h100_under_load() -> None:
    frame = pl.read_csv(DATA / "measured" / "h100_llama70b_load.csv")
    gpu, model = CATALOGUE.gpu("h100-80gb-sxm"), CATALOGUE.model("llama-3-70b")
    engines = {tp: EnginePhysics(gpu, model, tp) for tp in (4, 8)}
    points = frame.select("tensor_parallel", "clock_mhz", "requests_per_s").iter_rows()
    ours = [steady_state(engines[tp], clock, rate) for tp, clock, rate in points]
    errors = np.abs(np.array([w for _, w in ours]) / frame["power_w_all_gpus"].to_numpy() - 1)
    ratios = np.array([t for t, _ in ours]) / frame["tpot_p99_s"].to_numpy()
    print(f"H100 watts: median {np.median(errors):.1%}, worst {errors.max():.1%}")
    print(f"H100 mean TPOT over measured p99: {np.median(ratios):.2f}, {ratios.min():.2f} to {ratios.max():.2f}")
    assert np.median(errors) < 0.05
    assert errors.max() < 0.15
    assert 0.6 < np.median(ratios) < 1.0
    assert np.abs(ratios / np.median(ratios) - 1).max() < 0.35
