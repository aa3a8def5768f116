"""The picture: clock, batch and watts over time under each policy, and the energy, measured and simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from throttllem.files import write_aside
from throttllem.report.palette import policy_inks
from tools.loop.outcome import Found
from tools.loop.runs import Recorded

STYLE: Any = {
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}
BIN_S = 1.0
WATTS_S = 3.0
"""The counter moves ten times a second: in a shorter time its steps are seen, not the watts."""
HATCH = "////"
PLATE: Any = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
"""A figure stays readable on a line."""


def draw(found: Found, shown: Mapping[str, Recorded], file: Path) -> None:
    """`shown`: one run of each policy, for the lines."""
    colours = {name: ink.light for name, ink in zip(shown, policy_inks(tuple(shown)), strict=True)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        halves: Any = figure.subfigures(1, 2, width_ratios=(2.3, 1))
        lines, bars = halves
        panels = lines.subplots(3, 1, sharex=True)
        for policy, recorded in shown.items():
            _lines(panels, recorded, found.plan.window_s, policy, colours[policy])
        _titled(panels, found)
        _bars(bars.subplots(2, 1), found, colours)
        with write_aside(file) as aside:
            figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})


def _lines(panels: Sequence[Any], recorded: Recorded, window_s: float, policy: str, colour: str) -> None:
    run, steps = recorded.run, recorded.steps
    edges_s = np.arange(run.began_s, run.began_s + window_s + BIN_S / 2, BIN_S)
    middle_s = edges_s[:-1] - run.began_s + BIN_S / 2
    style: dict[str, Any] = {"color": colour, "linewidth": 1.3, "label": policy}
    panels[0].plot(middle_s, steps.series(steps.clock_mhz, edges_s), **style)
    panels[1].plot(middle_s, np.nan_to_num(steps.series(steps.rows, edges_s)), **style)
    panels[2].plot(middle_s, recorded.meter.watts(edges_s, spread_s=WATTS_S), **style)


def _titled(panels: Sequence[Any], found: Found) -> None:
    clock, batch, watts = panels
    clock.set(title="Clock while the engine works, MHz", ylim=(found.plan.lowest_mhz - 60, 1470))
    batch.set(title="Requests that decode", ylim=(0, None))
    watts.set(
        title=f"Watts, by NVML's energy counter over {WATTS_S:g} s",
        ylim=(0, 430),
        xlabel="seconds since the first request",
    )
    for panel in panels:
        panel.axvspan(found.sent[-1].at_s, found.plan.window_s, color="0.5", alpha=0.08, linewidth=0)
        panel.set_xlim(0, found.plan.window_s)
    batch.text(found.plan.window_s, batch.get_ylim()[1], "no more arrive ", ha="right", va="top", fontsize=8)
    clock.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=3, frameon=False, borderaxespad=0)


def _bars(panels: Sequence[Any], found: Found, colours: Mapping[str, str]) -> None:
    energy, late = panels
    names = list(colours)
    places = np.arange(len(names))
    for offset, live in ((-0.2, True), (0.2, False)):
        for place, name in zip(places, names, strict=True):
            if not live and name not in found.simulated:
                continue
            one = found.middle(name) if live else found.simulated[name]
            style: dict[str, Any] = {"color": colours[name]} if live else {"facecolor": "none", "hatch": HATCH}
            style |= {"edgecolor": colours[name], "width": 0.38}
            energy.bar(place + offset, one.energy_j / 1e3, **style)
            late.bar(place + offset, one.e2e_p99_s, **style)
            for panel, value in ((energy, one.energy_j / 1e3), (late, one.e2e_p99_s)):
                panel.text(place + offset, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8, bbox=PLATE)
            if live:
                for panel, values in (
                    (energy, [run.figures.energy_j / 1e3 for run in found.of(name)]),
                    (late, [run.figures.e2e_p99_s for run in found.of(name)]),
                ):
                    panel.plot([place + offset] * len(values), values, "_", color="black", markersize=7)
    late.axhline(found.plan.e2e_s, color="#b3261e", linestyle="--", linewidth=1)
    late.text(-0.58, found.plan.e2e_s, "SLO", ha="left", va="bottom", fontsize=8, color="#b3261e")
    energy.set_title("Energy, kJ (hatched: simulated)")
    late.set_title("E2E p99, s")
    for panel in panels:
        panel.set_xticks(places, [name.replace("-", "-\n") for name in names])
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.grid(axis="x", visible=False)
        panel.margins(y=0.12)
