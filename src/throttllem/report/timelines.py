"""Plots over time, a strip for each policy: clock, watts, batch, KV blocks, GPUs up.

Each function takes the runs and gives a `Plot`, or None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from throttllem.report.figure import Json, Panel, Plot, label, shorten, strips, time_unit
from throttllem.report.palette import token
from throttllem.report.quantity import percent
from throttllem.sim.result import RunResult, Series

_SeriesPick = Callable[[Series], Sequence[float | None]]


def clock_plot(runs: Sequence[RunResult]) -> Plot | None:
    """Clock over time, a strip for each policy."""
    return _over_time(
        runs,
        key="clock",
        title="GPU clock over time, MHz",
        caption="The engine that takes new requests; each point is the mean of one bin. Gaps: no engine was up.",
        pick=lambda series: series.clock_mhz,
        mean=lambda run: f"mean {run.mean_clock_mhz:.0f} MHz",
        from_zero=False,
    )


def power_plot(runs: Sequence[RunResult]) -> Plot | None:
    """Watts over time, a strip for each policy."""
    return _over_time(
        runs,
        key="power",
        title="Power over time, watts",
        caption="All GPUs that count, shadow engines included. The area under each curve is its energy.",
        pick=lambda series: series.power_w,
        mean=lambda run: f"mean {run.energy_j / run.duration_s:,.0f} W" if run.duration_s > 0 else "",
        from_zero=True,
    )


def size_plot(runs: Sequence[RunResult]) -> Plot | None:
    """GPUs up over time, of the policies that change the size; None where none does."""
    changing = [run for run in runs if len({size for size in run.series.tp if size is not None}) > 1]
    if not changing:
        return None
    return _over_time(
        runs,
        key="size",
        title="GPUs up over time",
        caption="Engines that take requests, drain or start up; a spike is an old and a new engine side by side. "
        "Policies that keep one size are not shown.",
        pick=lambda series: series.tp,
        mean=lambda run: f"{max(0, len(run.sizes) - 1)} changes of engine",
        from_zero=True,
        only=changing,
    )


def batch_plot(runs: Sequence[RunResult]) -> Plot | None:
    """Batch size, projected against actual, for the policies that project."""
    return _projected(
        runs,
        key="batch",
        title="Batch size, projected against actual",
        pick=lambda series: (series.batch, series.batch_projected),
        error=lambda run: run.projection_error.batch if run.projection_error else None,
    )


def kv_plot(runs: Sequence[RunResult]) -> Plot | None:
    """KV blocks, projected against actual, for the policies that project."""
    return _projected(
        runs,
        key="kv",
        title="KV blocks in use, projected against actual",
        pick=lambda series: (series.kv_blocks, series.kv_projected),
        error=lambda run: run.projection_error.kv if run.projection_error else None,
    )


def _title(run: RunResult, text: str) -> str:
    return f"<b>{label(run.policy)}</b>  {text}"


def _over_time(
    runs: Sequence[RunResult],
    *,
    key: str,
    title: str,
    caption: str,
    pick: _SeriesPick,
    mean: Callable[[RunResult], str],
    from_zero: bool,
    only: Sequence[RunResult] | None = None,
) -> Plot | None:
    seen = [value for run in runs for value in shorten(pick(run.series)) if value is not None]
    if not seen:
        return None
    unit, unit_s = time_unit(runs)
    shown = [(index, run) for index, run in enumerate(runs) if only is None or run in only]
    panels = []
    for index, run in shown:
        trace: Json = {
            "type": "scatter",
            "mode": "lines",
            "name": label(run.policy),
            "x": shorten([time_s / unit_s for time_s in run.series.time_s]),
            "y": shorten(pick(run.series)),
            # Not dashed: each strip holds one policy, and a dash hides short swings.
            "line": {"color": token(index), "width": 1.4, "shape": "hv"},
            **({"fill": "tozeroy"} if from_zero else {}),
        }
        panels.append(Panel(title=_title(run, mean(run)), traces=[trace]))
    low = 0.0 if from_zero else min(seen)
    room = 0.06 * (max(seen) - low) or 0.06 * max(seen) or 1.0
    span = (low if from_zero else low - room, max(seen) + room)
    data, shape, height_px = strips(panels, x_title=unit, y_range=span, legend=False)
    summary = "; ".join(f"{run.policy}: {mean(run)}" for _, run in shown)
    return Plot(key=key, title=title, caption=caption, summary=summary, height_px=height_px, data=data, layout=shape)


def _projected(
    runs: Sequence[RunResult],
    *,
    key: str,
    title: str,
    pick: Callable[[Series], tuple[Sequence[float | None], Sequence[float | None]]],
    error: Callable[[RunResult], float | None],
) -> Plot | None:
    projecting = [
        (index, run) for index, run in enumerate(runs) if any(value is not None for value in pick(run.series)[1])
    ]
    if not projecting:
        return None
    unit, unit_s = time_unit(runs)
    panels = []
    for place, (index, run) in enumerate(projecting):
        actual, projected = pick(run.series)
        x = shorten([time_s / unit_s for time_s in run.series.time_s])
        common: Json = {"type": "scatter", "mode": "lines", "x": x, "showlegend": place == 0}
        below = {**common, "name": "actual", "legendgroup": "actual", "y": shorten(actual), "fill": "tozeroy"}
        above = {**common, "name": "projected", "legendgroup": "projected", "y": shorten(projected)}
        ink = {"color": "@ink", "width": 1.1}
        told = f"mean error {percent(error(run), decimals=2)} %"
        traces = [{**below, "line": {"color": token(index), "width": 0}}, {**above, "line": ink}]
        panels.append(Panel(title=_title(run, told), traces=traces))
    seen = [
        value for _, run in projecting for values in pick(run.series) for value in shorten(values) if value is not None
    ]
    data, shape, height_px = strips(panels, x_title=unit, y_range=(0, max(seen) * 1.06 or 1.0), legend=True)
    summary = "; ".join(f"{run.policy}: mean error {percent(error(run), decimals=2)} %" for _, run in projecting)
    caption = "Means of each bin; the error is over all iterations. Policies that do not project are not shown."
    return Plot(key=key, title=title, caption=caption, summary=summary, height_px=height_px, data=data, layout=shape)
