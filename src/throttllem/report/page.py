"""The report: one HTML file with table, plots and scenario, that opens offline and loads nothing from anywhere.

Plotly's JavaScript is inlined once. Every value that comes from a run or a scenario is escaped on its way in, and the
page's own security policy forbids the browser to fetch anything at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from throttllem.files import ensure_writable_dir, write_aside
from throttllem.report.figure import Plot, dash
from throttllem.report.metric import METRICS, Metric
from throttllem.report.palette import themes
from throttllem.report.plots import all_plots
from throttllem.report.quantity import ABSENT, change, promises
from throttllem.report.verdict import baseline_of, is_promise_kept, saved, verdict
from throttllem.sim.result import RunResult

REPORT_NAME = "report.html"


def write_report(out_dir: Path, scenario: Mapping[str, object], runs: Sequence[RunResult]) -> Path:
    """Writes `report.html` into `out_dir` (made where absent) and returns its path.

    The page is complete before the first byte is written, and takes its name only when it lies on the disk whole.
    Raises ValueError where there are no runs, WriteError where the folder cannot be written.
    """
    page = render(scenario, runs)
    path = ensure_writable_dir(out_dir) / REPORT_NAME
    with write_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def render(scenario: Mapping[str, object], runs: Sequence[RunResult]) -> str:
    """The page as text. Raises ValueError where there are no runs."""
    baseline = baseline_of(runs)
    plots = all_plots(runs)
    drawn = {plot.key: {"data": plot.data, "layout": plot.layout} for plot in plots}
    template = Template(files("throttllem.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(_title(scenario)),
        lead=escape(_lead(scenario, baseline)),
        swatches=_swatches(runs),
        cards="\n".join(_card(index, run, baseline) for index, run in enumerate(runs)),
        table=_table(runs, baseline),
        plots="\n".join(_figure(plot, runs) for plot in plots),
        rejections=_rejections(runs),
        scenario="\n".join(_entry(name, value) for name, value in _flat(scenario)),
        baseline=escape(baseline.policy),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        figures=_script_json(drawn),
        themes=_script_json(themes([run.policy for run in runs])),
    )


def _title(scenario: Mapping[str, object]) -> str:
    parts = [scenario.get(name) for name in ("model", "gpu")]
    return " on ".join(str(part) for part in parts if part) or "simulation"


def _lead(scenario: Mapping[str, object], baseline: RunResult) -> str:
    trace = scenario.get("trace")
    of_trace = f" of {trace}" if isinstance(trace, str) else ""
    return (
        f"{baseline.requests:,} requests{of_trace}, {baseline.duration_s / 60:,.1f} minutes. "
        f"Promises: {promises(baseline.slo)}."
    )


def _script_json(value: object) -> str:
    """JSON that can neither end its script element nor open a comment in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _swatches(runs: Sequence[RunResult]) -> str:
    """The policies' colours as CSS variables, for both themes."""
    colours = themes([run.policy for run in runs])

    def variables(theme: str) -> str:
        names = (f"@policy{index}" for index in range(len(runs)))
        return "".join(f"--policy{index}:{colours[theme][name]};" for index, name in enumerate(names))

    return f":root{{{variables('light')}}}@media (prefers-color-scheme:dark){{:root{{{variables('dark')}}}}}"


def _swatch(index: int) -> str:
    return f'<span class="swatch" style="background:var(--policy{index})" aria-hidden="true"></span>'


def _card(index: int, run: RunResult, baseline: RunResult) -> str:
    if run is baseline:
        big, unit, chip = f"{run.energy_j / 1e3:,.0f}", "kJ", '<span class="chip">baseline</span>'
    else:
        big, unit = change(saved(run, baseline)), "% energy"
        kept = is_promise_kept(run, baseline)
        points = (baseline.slo.attainment - run.slo.attainment) * 100
        chip = (
            '<span class="chip good">✓ promises kept</span>'
            if kept
            else f'<span class="chip bad">✗ {points:.1f} points fewer kept</span>'
        )
    sentence = verdict(run, baseline).removeprefix(f"{run.policy}: ")
    return (
        f'<li class="card" style="--mark:var(--policy{index})"><h3>{escape(run.policy)}</h3>{chip}'
        f'<p class="big">{big}<small> {unit}</small></p><p>{_unbroken(sentence)}.</p></li>'
    )


def _unbroken(sentence: str) -> str:
    """Escaped, with units kept on the line of their number."""
    return escape(sentence).replace(" %", "&nbsp;%").replace(" kJ", "&nbsp;kJ")


def _table(runs: Sequence[RunResult], baseline: RunResult) -> str:
    names = "".join(
        f'<th scope="col">{_swatch(index)}{escape(run.policy).replace("+", "<wbr>+")}</th>'
        for index, run in enumerate(runs)
    )
    body = []
    for group, metrics in groupby(sorted(METRICS, key=lambda metric: _GROUPS.index(metric.group)), _group_of):
        rows = "".join(_row(metric, runs, baseline) for metric in metrics)
        heading = f'<tr class="group"><th scope="rowgroup" colspan="{len(runs) + 1}">{escape(group)}</th></tr>'
        body.append(f"<tbody>{heading}{rows}</tbody>")
    return f"<table><thead><tr><td></td>{names}</tr></thead>{''.join(body)}</table>"


_GROUPS = ("Energy", "Promises", "Latency", "Requests", "Controller")


def _group_of(metric: Metric) -> str:
    return metric.group


def _row(metric: Metric, runs: Sequence[RunResult], baseline: RunResult) -> str:
    cells = "".join(
        f'<td class="{metric.tone(run, baseline)}">{escape(metric.text(run, baseline))}</td>' for run in runs
    )
    return f'<tr><th scope="row">{escape(metric.title)}</th>{cells}</tr>'


def _key(runs: Sequence[RunResult]) -> str:
    """Which line is whose; dashed as figure.line draws it."""
    entries = "".join(
        f'<li><span class="dash" style="border-top:3px {dash(run)} var(--policy{index})" aria-hidden="true"></span>'
        f"{escape(run.policy)}</li>"
        for index, run in enumerate(runs)
    )
    return f'<ul class="key">{entries}</ul>'


def _figure(plot: Plot, runs: Sequence[RunResult]) -> str:
    row = "wide" if plot.wide else "half"
    spoken = escape(f"{plot.title}: {plot.summary}")
    return (
        f'<figure class="{row}" aria-labelledby="title-{plot.key}">'
        f'<h3 id="title-{plot.key}">{escape(plot.title)}</h3>{_key(runs) if plot.keyed else ""}'
        f'<div class="plot" id="plot-{plot.key}" role="img" style="height:{plot.height_px}px" aria-label="{spoken}">'
        f"</div><figcaption>{escape(plot.caption)}</figcaption></figure>"
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


def _entry(name: str, text: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
