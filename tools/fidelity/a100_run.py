"""One served run on an A100-80GB SXM with its power log: the watts of the SXM parts, and the ITL that follows.

The PCIe part's power law, scaled; scale and static watts are fitted to three levels of the run. The paper's tokens/J
are never looked at: `throttllem reproduce` judges them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from numpy.typing import NDArray

from throttllem.calibrate.errors import Errors
from throttllem.calibrate.fit import Constant, fit, with_constants
from throttllem.physics.catalogue import Catalogue, Gpu
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Model
from tools.fidelity.section import ErrorRow, Plot, Section, Target

FILE, LENGTHS = "a100_80gb_sxm_qwen3_8b_sharegpt.csv", "a100_80gb_sxm_qwen3_8b_lengths.csv"
MEASURED, SHIPPED, PCIE = "a100-80gb-sxm", "a100-40gb-sxm", "a100-40gb-pcie"
MODEL = "qwen3-8b"
SCALED = ("memory_w", "core_w", "compute_w")
SHAPE = ("knee_mhz", "voltage_rise", "voltage_exponent")
LIMIT = 0.08
_SCATTER = 0.03


class Levels(NamedTuple):
    """Watts: nothing running, one request, the typical batch, the mean of the busy time; seconds of an iteration."""

    idle_w: float
    one_w: float
    typical_w: float
    busy_w: float
    one_s: float
    typical_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was served: the clock, requests a second, and tokens of the mean request."""

    clock_mhz: int
    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    levels: Levels

    @property
    def context_tokens(self) -> float:
        """Mean of a running request: a long answer runs for longer, which is left out."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def batch(self) -> int:
        """Mean of the running requests, by Little's law and the measured ITL."""
        return round(self.requests_per_s * self.output_tokens * self.levels.typical_s)


def section(data: Path, catalogue: Catalogue) -> Section:
    """The shipped 80 GB part against the run, and the constants that a new fit gives to both SXM parts."""
    run = read_run(data)
    gpu, model = catalogue.gpu(MEASURED), catalogue.model(MODEL)
    ours = levels(gpu, model, run)
    errors = np.array(ours) / np.array(run.levels) - 1
    watts, seconds = Errors.of(errors[:4]), Errors.of(errors[4:])  # nothing of the seconds is fitted to the run
    return Section(
        title="A100-80GB SXM serving Qwen3-8B: one run",
        text=_text(run, ours),
        rows=(
            ErrorRow(what="watts: idle, one request, typical, busy mean", held_out="nothing", errors=watts),
            ErrorRow(what="ITL: one request, typical", held_out="nothing", errors=seconds),
        ),
        targets=(
            Target(
                what="watts, worst of idle, one request, typical and busy mean",
                limit=f"{LIMIT:.0%}",
                found=f"{watts.worst:.1%}",
                met=watts.worst <= LIMIT,
            ),
        ),
        plots=(
            Plot(
                name="a100-sxm-watts",
                caption="A100-80GB SXM, Qwen3-8B: watts over the clock by the physics, and the run's at 1,410 MHz.",
                draw=functools.partial(_draw, gpu, model, run),
            ),
        ),
        constants={SHIPPED: fitted(catalogue, run)},
    )


def read_run(data: Path) -> Run:
    """Figures of grantwilkins/powertrace-sim, and the lengths of its requests."""
    rows = pl.read_csv(data / "measured" / FILE, schema_overrides={"value": pl.String})
    value = dict(rows.select("what", "value").iter_rows())
    lengths = pl.read_csv(data / "measured" / LENGTHS)
    return Run(
        clock_mhz=int(value["sm_clock"]),
        requests_per_s=float(value["request_rate"]),
        prompt_tokens=float(lengths["prompt_tokens"].to_numpy().mean()),
        output_tokens=float(lengths["output_tokens"].to_numpy().mean()),
        levels=Levels(
            idle_w=float(value["idle_with_context"]),
            one_w=float(value["decode_watts_low"]),
            typical_w=float(value["decode_watts_typical"]),
            busy_w=float(value["busy_mean"]),
            one_s=float(value["itl_batch1"]) / 1e3,
            typical_s=float(value["itl_typical"]) / 1e3,
        ),
    )


def levels(gpu: Gpu, model: Model, run: Run) -> Levels:
    """The law's: every request brings one iteration with its prompt, and its share of the others."""
    engine = EnginePhysics(gpu, model, 1)
    one_s, one_w = engine.iteration(run.clock_mhz, 1, round(run.context_tokens), 0, 0.0)
    held = round(run.batch * run.context_tokens)
    plain_s, plain_w = engine.iteration(run.clock_mhz, run.batch, held, 0, 0.0)
    prompt = round(run.prompt_tokens)
    mixed_s, mixed_w = engine.iteration(run.clock_mhz, run.batch, held, prompt, prompt**2 / 2)
    plain = run.output_tokens / run.batch - 1
    busy_w = (plain * plain_s * plain_w + mixed_s * mixed_w) / (plain * plain_s + mixed_s)
    return Levels(engine.idle_w(), one_w, plain_w, busy_w, one_s, plain_s)


def fitted(catalogue: Catalogue, run: Run) -> dict[str, float]:
    """Watts of the SXM parts by path; their voltage is the PCIe part's, which is the same chip."""
    gpu, pcie, model = catalogue.gpu(MEASURED), catalogue.gpu(PCIE), catalogue.model(MODEL)
    shape = {f"power.{name}": float(getattr(pcie.power, name)) for name in SHAPE}
    expected = gpu.power.limit_w / pcie.power.limit_w
    constants = (
        Constant(path="power.core_w", start=pcie.power.core_w * expected, spread=0.3),
        Constant(path="power.static_w", start=0.06 * gpu.power.limit_w, spread=0.7),
    )

    def tied(moved: Gpu) -> Gpu:
        scale = moved.power.core_w / pcie.power.core_w
        return with_constants(moved, {f"power.{name}": getattr(pcie.power, name) * scale for name in SCALED})

    def residuals(moved: Gpu) -> NDArray[np.float64]:
        ours = levels(tied(moved), model, run)
        return np.asarray(np.log(np.array(ours[1:4]) / np.array(run.levels[1:4])) / _SCATTER)

    found = tied(fit(with_constants(gpu, shape), constants, residuals).gpu)
    values = {f"power.{name}": float(getattr(found.power, name)) for name in ("static_w", *SCALED)}
    return values | shape


def _draw(gpu: Gpu, model: Model, run: Run, figure: Figure) -> None:
    axes, engine = figure.subplots(), EnginePhysics(gpu, model, 1)
    for batch in (1, run.batch, 32, 128):
        held = round(batch * run.context_tokens)
        watts = [engine.iteration(clock, batch, held, 0, 0.0)[1] for clock in gpu.clocks_mhz]
        axes.plot(gpu.clocks_mhz, watts, label=f"batch {batch}")
    measured = (run.levels.one_w, run.levels.typical_w)
    axes.plot([run.clock_mhz] * 2, measured, "o", color="black", label="measured: 1, and a few to ten")
    axes.plot([run.clock_mhz], [run.levels.idle_w], "s", color="black", label="measured: idle, model loaded")
    axes.set_xlabel("clock / MHz")
    axes.set_ylabel("watts")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")


def _text(run: Run, ours: Levels) -> str:
    return (
        f"200 ShareGPT requests at {run.requests_per_s} requests/s on one A100-80GB SXM at {run.clock_mhz:,} MHz, "
        "Qwen3-8B under vLLM 0.10 with a power log (figures of grantwilkins/powertrace-sim). Measured, and by the law: "
        f"idle with the model loaded {run.levels.idle_w:.0f} and {ours.idle_w:.0f} W, one request "
        f"{run.levels.one_w:.0f} and {ours.one_w:.0f} W, a few to ten {run.levels.typical_w:.0f} and "
        f"{ours.typical_w:.0f} W (the law's batch is {run.batch}, by Little's law), mean of the busy time "
        f"{run.levels.busy_w:.0f} and {ours.busy_w:.0f} W; ITL of one request {run.levels.one_s * 1e3:.1f} and "
        f"{ours.one_s * 1e3:.1f} ms, typical {run.levels.typical_s * 1e3:.1f} and {ours.typical_s * 1e3:.1f} ms.\n\n"
        "Two constants are fitted to three levels: how much of the PCIe part's dynamic watts, and static ones. Its "
        "clock law is the PCIe part's, so watts below 1,410 MHz are modelled. Earlier releases fitted these constants "
        "to the paper's 0.69 tokens/J and its gain of 37.4 % at 1,050 MHz, which put 396 W at batch 1 and 207 W at "
        "210 MHz on this GPU; a real one draws neither."
    )
