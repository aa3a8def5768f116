"""The report: one HTML file with table, plots and scenario, that opens offline and loads nothing.

Plotly's JavaScript is inlined once. Every value from a run or a scenario is escaped, and the page's own security policy
forbids the browser to fetch anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from throttllem.files import ensure_writable_dir, write_aside
from throttllem.report.basis import assumed_slos, certainty, lengths, physics
from throttllem.report.cost import cost_options, factors
from throttllem.report.figure import Plot, dash
from throttllem.report.metrics import ABSENT, GROUPS, Metric, baseline_of, metrics, percent, slo_met, slos, verdict
from throttllem.report.palette import dark_colours, policy_inks
from throttllem.report.plots import all_plots
from throttllem.sim.result import RunResult

REPORT_NAME = "report.html"


def write_report(out_dir: Path, scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> Path:
    """Write `report.html` into `out_dir` (created if absent); returns its path.

    The file appears whole or not at all. Raises ValueError if there are no runs, WriteError if the folder cannot be
    written.
    """
    page = render(scenario, runs)
    path = ensure_writable_dir(out_dir) / REPORT_NAME
    with write_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def render(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> str:
    """The page as text. Raises ValueError if there are no runs."""
    baseline, options = baseline_of(runs), cost_options(scenario)
    plots = all_plots(runs)
    template = Template(files("throttllem.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(
            " on ".join(str(scenario[name]) for name in ("model", "gpu") if scenario.get(name)) or "simulation"
        ),
        lead=escape(_lead(scenario, baseline)),
        basis="\n".join(
            f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in _rests_on(scenario, runs)
        ),
        factors=escape(factors(options)),
        swatches=_swatches(runs),
        cards="\n".join(_card(index, run, baseline, scenario) for index, run in enumerate(runs)),
        table=_table(runs, baseline, metrics(options)),
        plots="\n".join(_figure(plot, runs) for plot in plots),
        rejections=_rejections(runs),
        scenario="\n".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _flat(scenario)
        ),
        baseline=escape(baseline.policy),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        figures=_script_safe("{" + ",".join(f'"{plot.key}":{plot.figure.to_json()}' for plot in plots) + "}"),
        dark=_script_safe(json.dumps(dark_colours([run.policy for run in runs]))),
    )


def _rests_on(scenario: Mapping[str, Any], runs: Sequence[RunResult]) -> Iterator[tuple[str, str]]:
    """What is measured, modelled and simulated, for the top of the page."""
    yield "Measured", "Nothing: no request was served, and no clock was set."
    yield (
        "Simulated",
        "Requests, batches, queues, clocks and SLOs: the gateway's control core over a trace, in virtual time.",
    )
    laws = physics(scenario, runs) or ["seconds and watts of the simulated GPU"]
    yield "Modelled", f"By the physics: {'; '.join(laws)}. Energy, CO2 and cost follow from them."
    if assumed := assumed_slos(scenario):
        yield "SLOs", assumed
    yield "Output lengths", f"{_capital(lengths(scenario))}."
    yield "Certainty", _capital(certainty(scenario, runs).removeprefix("Certainty: "))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lead(scenario: Mapping[str, Any], baseline: RunResult) -> str:
    trace = scenario.get("trace")
    of_trace = f" of {trace}" if isinstance(trace, str) else ""
    size = f"{baseline.requests:,} requests{of_trace}, {baseline.duration_s / 60:,.1f} minutes"
    return f"{size}. SLOs: {slos(baseline.slo)}."


def _script_safe(text: str) -> str:
    """JSON that can neither end its script element nor open a comment in it."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _swatches(runs: Sequence[RunResult]) -> str:
    """The policies' colours as CSS variables, for both themes."""
    inks = list(enumerate(policy_inks([run.policy for run in runs])))
    light = "".join(f"--policy{index}:{ink.light};" for index, ink in inks)
    dark = "".join(f"--policy{index}:{ink.dark};" for index, ink in inks)
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _card(index: int, run: RunResult, baseline: RunResult, scenario: Mapping[str, Any]) -> str:
    met = "assumed SLOs met" if scenario.get("slo_assumed") else "SLOs met"
    if run is baseline:
        chip = '<span class="chip">baseline</span>'
    else:
        points = percent(baseline.slo.attainment - run.slo.attainment)
        chip = (
            f'<span class="chip good">✓ {met}</span>'
            if slo_met(run, baseline)
            else f'<span class="chip bad">✗ {points} points fewer met</span>'
        )
    sentence = escape(verdict(run, baseline).removeprefix(f"{run.policy}: "))
    # A unit stays on the line of its number.
    sentence = sentence.replace(" %", "&nbsp;%").replace(" kJ", "&nbsp;kJ")
    return (
        f'<li class="card" style="--mark:var(--policy{index})"><h3>{escape(run.policy)}</h3>{chip}'
        f'<p class="big">{run.energy_j / 1e3:,.0f}<small> kJ simulated</small></p><p>{sentence}.</p></li>'
    )


def _table(runs: Sequence[RunResult], baseline: RunResult, every: Sequence[Metric]) -> str:
    names = "".join(
        f'<th scope="col"><span class="swatch" style="background:var(--policy{index})" aria-hidden="true"></span>'
        f"{escape(run.policy).replace('+', '<wbr>+')}</th>"
        for index, run in enumerate(runs)
    )
    body = []
    for group, rows_of in groupby(sorted(every, key=_place), lambda metric: metric.group):
        rows = "".join(_row(metric, runs, baseline) for metric in rows_of)
        heading = f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}">{escape(group)}</th></tr>'
        body.append(f"<tbody>{heading}{rows}</tbody>")
    return f"<table><thead><tr><td></td>{names}</tr></thead>{''.join(body)}</table>"


def _place(metric: Metric) -> int:
    return GROUPS.index(metric.group)


def _row(metric: Metric, runs: Sequence[RunResult], baseline: RunResult) -> str:
    cells = "".join(
        f'<td class="{metric.tone(run, baseline)}">{escape(metric.text(run, baseline))}</td>' for run in runs
    )
    return f'<tr><th scope="row">{escape(metric.title)}</th>{cells}</tr>'


def _figure(plot: Plot, runs: Sequence[RunResult]) -> str:
    key = "".join(
        f'<li><span class="dash" style="border-top:3px {dash(run)} var(--policy{index})" aria-hidden="true"></span>'
        f"{escape(run.policy)}</li>"
        for index, run in enumerate(runs)
    )
    return (
        f'<figure class="{"wide" if plot.wide else "half"}" aria-labelledby="title-{plot.key}">'
        f'<h3 id="title-{plot.key}">{escape(plot.title)}</h3>{f"""<ul class="key">{key}</ul>""" if plot.keyed else ""}'
        f'<div class="plot" id="plot-{plot.key}" role="img" style="height:{plot.figure.layout.height}px" '
        f'aria-label="{escape(f"{plot.title}: {plot.summary}")}"></div>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _rejections(runs: Sequence[RunResult]) -> str:
    entries = [
        f"<li>{escape(run.policy)}: {count:,} because {escape(why)}</li>"
        for run in runs
        for why, count in run.rejections.items()
    ]
    return f"<h3>Why requests were rejected</h3><ul>{''.join(entries)}</ul>" if entries else ""


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested scenario as (dotted name, text)."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: object) -> str:
    match value:
        case None:
            return ABSENT
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list() | tuple():
            return ", ".join(_text(part) for part in value)
        case _:
            return str(value)
