"""Models served by vLLM on H100 and B200 at default clocks (ML.ENERGY leaderboard v3): ITL and watts of steady batches.

Knows nothing of fits nor of reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model, Weights

FILE = Path("measured") / "mlenergy_gpqa.csv"
GPUS = {"H100": "h100-80gb-sxm", "B200": "b200-180gb-sxm"}
_NAMES = {
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-30B-A3B-Thinking-2507": "qwen3-30b-a3b",
    "Qwen/Qwen3-235B-A22B-Thinking-2507": "qwen3-235b-a22b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "deepseek-ai/DeepSeek-R1-0528": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3.1": "deepseek-v3",
}
_FP8 = {"Qwen/Qwen3-235B-A22B-Thinking-2507-FP8": "qwen3-235b-a22b"}
"""Checkpoints of the same models with FP8 weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One batch in its steady state. `power_w` of all GPUs, `context_tokens` the mean of a request."""

    model: Model
    gpu: str
    gpus: int
    batch: int
    context_tokens: float
    itl_s: float
    power_w: float

    @property
    def stalled(self) -> bool:
        """Whether the host, not the GPU, set the pace: one B200 with a Qwen3, 30 to 45 ms whatever the size."""
        return self.gpu == GPUS["B200"] and self.gpus == 1 and self.model.name.startswith("qwen3")

    @property
    def special(self) -> bool:
        """A mixture of experts, or FP8."""
        return self.model.experts is not None or self.model.weights is Weights.FP8


def read_rows(data: Path, catalogue: Catalogue) -> list[Row]:
    """All rows of models that the catalogue can describe; hybrids with Mamba layers are left out."""
    models = {name: catalogue.model(ours) for name, ours in _NAMES.items()}
    for name, ours in _FP8.items():
        model = catalogue.model(ours)
        models[name] = model.model_copy(update={"name": f"{model.name}-fp8", "weights": Weights.FP8})
    columns = (
        "model", "gpu", "gpus", "mean_batch", "mean_context_tokens", "median_itl_ms", "mean_power_w_all_gpus",
    )  # fmt: skip
    return [
        Row(
            model=models[model], gpu=GPUS[gpu], gpus=gpus, batch=round(batch), context_tokens=context,
            itl_s=itl_ms / 1e3, power_w=watts,
        )
        for model, gpu, gpus, batch, context, itl_ms, watts in pl.read_csv(data / FILE).select(columns).iter_rows()
        if model in models
    ]  # fmt: skip


def ratios(gpus: Sequence[Gpu], rows: Sequence[Row]) -> NDArray[np.float64]:
    """ITL and watts of the law over those measured, a row for each row; `gpus` by their names."""
    known = {gpu.name: gpu for gpu in gpus}
    engines: dict[tuple[str, str, int], EnginePhysics] = {}
    found = []
    for row in rows:
        key = row.gpu, row.model.name, row.gpus
        if key not in engines:
            engines[key] = EnginePhysics(known[row.gpu], row.model, row.gpus)
        kv_tokens = round(row.batch * row.context_tokens)
        itl_s, power_w = engines[key].iteration(known[row.gpu].clock_max_mhz, row.batch, kv_tokens, 0, 0.0)
        found.append((itl_s / row.itl_s, power_w / row.power_w))
    return np.array(found).reshape(-1, 2)
