"""An arena's result as text: tables for the terminal and for docs/evaluation/arena.md, and the picture as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape

from throttllem.arena.cells import Cell, Grid
from throttllem.arena.contenders import BASELINE, GATHERING, OURS, RIVALS, SCHED, SCHED_HOLD, STATIC, Field
from throttllem.arena.contest import Entry, rows_of
from throttllem.arena.results.standings import (
    Mean,
    by_cell,
    least,
    meets,
    online,
    saving,
    share_of_reference,
    shortfall,
    targets,
)
from throttllem.report.palette import policy_inks

_PLAIN = {True: "met", False: "not met", None: "not run"}
_MET = {True: "met", False: "**not met**", None: "not run"}


def markdown(entries: Sequence[Entry], grid: Grid, *, command: str, tree: str, picture: str) -> str:
    """The page of the last run."""
    seeds = sorted({entry.seed for entry in entries})
    parts = [
        "# The arena",
        f"Written by `{command}`: {len(grid.cells)} cells of the {grid.name} grid, {_seeds(seeds)}, sources `{tree}`.",
        _RESTS,
        f"![Energy saved against the maximum clock]({picture})",
        "## Targets",
        _rows(
            ("to show", "found", ""),
            [(target.asked, target.found, _MET[target.met]) for target in targets(entries)],
        ),
        "## Energy against the maximum clock, %",
        _ABOUT_ROWS,
        _rows(*_by_group(entries, grid)),
        "## Cell by cell",
        _ABOUT_CELLS,
        _rows(*_by_cell(entries)),
        "## Latency and attainment",
        _rows(*_latencies(entries)),
        "## What hindsight chose, and what is set beforehand",
        _rows(*_parameters(entries)),
    ]
    return "\n\n".join(parts) + "\n"


_RESTS = """Everything here is **simulated**: the control core, or a rival in its place, over generated requests in
virtual time, on engines whose seconds and watts are [modelled](../physics.md). Rivals are 20 to 60 lines each, after
their papers and not by their authors (`src/throttllem/arena/rivals`). How the grid is made and how to enter a policy
of your own: [Simulate my trace](../simulation.md#the-arena)."""

_ABOUT_ROWS = """Mean over the cells of a group, and half of a 95 % interval over the seeds. Energy is over the same
window for every policy: the trace and the E2E SLO after it, idle in the rest. `static` is one clock for the whole
cell, and each rival has one parameter: both are chosen in hindsight, per cell and seed, as the least energy with
attainment at most half a point below the baseline's. `static-yesterday` is the clock that was best with another
seed; `-beforehand` is the value that was best on the tuning grid. **Bold**: attainment is more than half a point
below the baseline's in some cell."""

_ABOUT_CELLS = """Names: engine, requests, busiest minute as a share of the engine's maximum load, and what differs.
Saved energy in %, means over the seeds; a star where attainment is more than half a point below the baseline's."""


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _signed(value: Mean) -> str:
    """A saving as a signed change of energy."""
    text = f"{-value.value * 100:+.1f}".replace("-", "−")
    return text if value.half_width is None else f"{text} ±{value.half_width * 100:.1f}"


def _by_group(entries: Sequence[Entry], grid: Grid) -> tuple[list[str], list[list[str]]]:
    groups = {group: [entry for entry in entries if entry.cell.group == group] for group in grid.groups}
    cells = by_cell(entries)
    head = ["policy", *groups, "all"]
    rows = []
    for name in rows_of(entries):
        if name == BASELINE:
            continue
        short = not all(meets(seeds, name) for seeds in cells.values())
        savings = [_signed(Mean(value=saving(of, name).value, half_width=None)) for of in groups.values()]
        label = f"**`{name}`**" if short else f"`{name}`"
        share = share_of_reference(entries, name, SCHED)
        rows.append([label, *savings, _signed(saving(entries, name)), "–" if share is None else f"{share * 100:.0f}"])
    return [*head, f"of `{SCHED}`, %"], rows


def _shown(entries: Sequence[Entry]) -> list[str]:
    """The contenders of the table of cells."""
    wanted = ("throttllem", OURS, STATIC, GATHERING, SCHED, SCHED_HOLD)
    return [name for name in wanted if name in rows_of(entries)]


def _by_cell(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    shown, names = _shown(entries), rows_of(entries)
    rivals = [name for name in names if name not in (*shown, BASELINE)]
    bounded = all(entry.bound_j is not None for entry in entries)
    head = ["cell", "E2E SLO, s", "triton, kJ", *(f"`{name}`" for name in shown)]
    head += ["best other", "best deployable", *(["at most"] if bounded else [])]
    rows = []
    for cell, seeds in by_cell(entries).items():
        values = [_of_cell(seeds, name) for name in shown]
        other, deployable = least(seeds, rivals), least(seeds, online([*shown, *rivals]))
        energy_kj = sum(entry.baseline.energy_j for entry in seeds) / len(seeds) / 1e3
        best = f"{_of_cell(seeds, other)} `{other}`" if rivals else "–"
        rows.append(
            [f"`{cell.name}`", f"{seeds[0].slo_e2e_s:.1f}", f"{energy_kj:,.0f}", *values, best, f"`{deployable}`"]
        )
        if bounded:
            bounds = [1.0 - (entry.bound_j or 0.0) / entry.baseline.energy_j for entry in seeds]
            rows[-1].append(f"{sum(bounds) / len(bounds) * 100:.1f}")
    return head, rows


def _of_cell(seeds: Sequence[Entry], name: str) -> str:
    return f"{saving(seeds, name).value * 100:.1f}".replace("-", "−") + ("" if meets(seeds, name) else "*")


def _latencies(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    head = [
        *("policy", "attainment against the baseline, points: mean", "worst cell", "cells below by more than 0.5"),
        *("TTFT p50, s", "p99", "TPOT p50, ms", "p99", "clock, MHz", "switches/min", "decision p99, ms"),
    ]
    cells = by_cell(entries)
    rows = []
    for name in rows_of(entries):
        outcomes = [entry.rows[name] for entry in entries]
        minutes = [entry.window_s / 60 for entry in entries]
        rows.append(
            [
                f"`{name}`",
                f"{-shortfall(entries, name).value * 100:+.2f}",
                f"{-max(shortfall(seeds, name).value for seeds in cells.values()) * 100:+.1f}",
                str(sum(not meets(seeds, name) for seeds in cells.values())),
                *(
                    _mean_of([getattr(outcome, field) for outcome in outcomes], factor, decimals)
                    for field, factor, decimals in (
                        *(("ttft_p50_s", 1, 2), ("ttft_p99_s", 1, 2), ("tpot_p50_s", 1e3, 0), ("tpot_p99_s", 1e3, 0)),
                        ("mean_clock_mhz", 1, 0),
                    )
                ),
                _mean_of([o.clock_switches / m for o, m in zip(outcomes, minutes, strict=True)], 1, 0),
                _mean_of([outcome.decision_p99_s for outcome in outcomes], 1e3, 2),
            ]
        )
    return head, rows


def _mean_of(values: Sequence[float | None], factor: float, decimals: int) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known) * factor:.{decimals}f}" if known else "–"


def _parameters(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Of each rival, how often each value was chosen."""
    rows = []
    for rival in RIVALS:
        if rival.name not in entries[0].tried:
            continue
        chosen = [entry.rows[rival.name].setting for entry in entries]
        counts = [f"{value:g}: {chosen.count(rival.policy(value).name)}" for value in rival.values]
        rows.append([f"`{rival.name}`", rival.parameter, ", ".join(counts), f"{rival.beforehand:g}"])
    return ["rival", "parameter", "chosen in hindsight: times", "beforehand"], rows


def best_beforehand(entries: Sequence[Entry]) -> list[tuple[str, float, float, float]]:
    """For each rival (name, value, mean saving, mean shortfall) of the value to set beforehand: least energy with a
    mean attainment at most half a point below the baseline's, else the value that comes closest.
    """
    found = []
    for rival in RIVALS:
        if rival.name not in entries[0].tried:
            continue
        scores = []
        for index, value in enumerate(rival.values):
            outcomes = [(entry.tried[rival.name][index], entry.baseline) for entry in entries]
            saved = sum(outcome.saved(baseline) for outcome, baseline in outcomes) / len(outcomes)
            short = sum(baseline.attainment - outcome.attainment for outcome, baseline in outcomes) / len(outcomes)
            scores.append((short <= 0.005, saved if short <= 0.005 else -short, value, saved, short))
        _, _, value, saved, short = max(scores)
        found.append((rival.name, value, saved, short))
    return found


def terminal(entries: Sequence[Entry], grid: Grid) -> list[str]:
    """Lines for the terminal: means by contender, the targets, and the values to set rivals to beforehand."""
    lines = [f"simulated: energy against the maximum clock over {len(grid.cells)} cells; attainment against it, points"]
    cells = by_cell(entries)
    for name in rows_of(entries):
        missed = sum(not meets(seeds, name) for seeds in cells.values())
        attained = -shortfall(entries, name).value * 100
        below = f", {missed} cells more than 0.5 below" if missed else ""
        lines.append(f"  {name:<24} {_signed(saving(entries, name)):>13} %   {attained:+.2f}{below}")
    lines += [f"{_PLAIN[target.met]}: {target.asked}: {target.found}".replace("`", "") for target in targets(entries)]
    if grid.name == "tuning":
        lines += [
            f"beforehand, {name}: {value:g} ({saved * 100:.1f} % saved, attainment {-short * 100:+.2f} points)"
            for name, value, saved, short in best_beforehand(entries)
        ]
    return lines


def picture(entries: Sequence[Entry]) -> str:
    """Bars of the mean saving of every contender, with intervals, as SVG."""
    names = sorted(
        (name for name in rows_of(entries) if name != BASELINE), key=lambda name: -saving(entries, name).value
    )
    cells = by_cell(entries)
    inks = dict(zip(names, policy_inks(names), strict=True))
    most = max(0.01, *(saving(entries, name).value for name in names)) * 1.12
    width, row, left = 860, 26, 190
    scale = (width - left - 90) / most
    lines = []
    for index, name in enumerate(names):
        mean, y = saving(entries, name), 44 + index * row
        length = max(0.0, mean.value) * scale
        short = sum(not meets(seeds, name) for seeds in cells.values())
        fill = f'fill="{inks[name].light}"' + (' fill-opacity="0.35"' if short else "")
        lines.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
        lines.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="16" {fill}/>')
        if mean.half_width:
            ends = [left + max(0.0, mean.value + sign * mean.half_width) * scale for sign in (-1, 1)]
            lines.append(f'<path d="M{ends[0]:.1f} {y + 8}H{ends[1]:.1f}" stroke="#1b2129"/>')
        note = f"{mean.value * 100:.1f} %" + (f", {short} cells miss SLOs" if short else "")
        lines.append(f'<text x="{left + length + 8:.1f}" y="{y + 12}">{note}</text>')
    height = 60 + len(names) * row
    title = "Energy saved against the maximum clock, mean over the cells (simulated); pale: SLOs are missed in some"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 60} {height}" role="img" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13"><title>{escape(title)}</title>'
        f'<rect width="{width + 60}" height="{height}" fill="#fafafa"/>'
        f'<text x="16" y="26" font-weight="bold">{escape(title)}</text>{"".join(lines)}</svg>\n'
    )


def results_json(entries: Sequence[Entry], field: Field, tree: str) -> dict[str, object]:
    """Every figure of an arena."""
    return {
        "basis": "simulated",
        "tree": tree,
        "policies": list(field.names),
        "targets": [asdict(target) for target in targets(entries)],
        "entries": [
            {
                "cell": entry.cell.name,
                "group": entry.cell.group,
                "seed": entry.seed,
                "slo": _slo(entry.cell, entry.slo_e2e_s),
                "requests": entry.requests,
                "window_s": entry.window_s,
                "bound_j": entry.bound_j,
                "rows": {name: asdict(outcome) for name, outcome in entry.rows.items()},
                "tried": {name: [asdict(outcome) for outcome in tried] for name, tried in entry.tried.items()},
            }
            for entry in entries
        ],
    }


def _slo(cell: Cell, e2e_s: float) -> dict[str, float | None]:
    return {"e2e_s": e2e_s, "tbt_s": cell.slo_tbt_s, "ttft_s": cell.slo_ttft_s}
