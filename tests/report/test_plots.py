from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects
import pytest

from throttllem.report.distributions import MOST_POINTS, counted_curve, curve
from throttllem.report.palette import policy_inks, themes
from throttllem.report.plots import all_plots

from .factory import make_run, make_runs

COLOURS = themes([run.policy for run in make_runs()])["light"]


def painted(value: object, key: str = "") -> object:
    """The figure with the light theme's colours, as the page paints it."""
    if isinstance(value, dict):
        return {name: painted(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [painted(part, key) for part in value]
    return COLOURS[value] if isinstance(value, str) and key.endswith("color") else value


def test_plotly_knows_every_setting() -> None:
    for plot in all_plots(make_runs()):
        # Unknown names, values out of range and colours that are none raise here.
        plotly.graph_objects.Figure(data=painted(plot.data), layout=painted(plot.layout))


def test_every_plot_is_there_and_says_what_it_shows() -> None:
    plots = {plot.key: plot for plot in all_plots(make_runs())}
    assert list(plots) == ["energy", "attainment", "clock", "power", "e2e", "tpot", "tbt", "size", "batch", "kv"]
    assert "throttllem 421.1 kJ, −31.2 %" in plots["energy"].summary
    assert "SLO 16.0 s" in plots["e2e"].summary
    assert "mean error 1.81 %" in plots["kv"].summary


def test_what_has_nothing_to_show_is_left_out() -> None:
    plots = {plot.key: plot for plot in all_plots([make_run("triton")])}
    assert not {"size", "batch", "kv"} & set(plots), "one size, no projection"
    assert plots["tbt"].wide, "its partner is missing"
    assert not plots["clock"].wide


def test_a_run_in_which_nothing_ran_is_drawn_all_the_same() -> None:
    run = make_run("triton", energy=0.0, requests=0, duration_s=0.0)
    empty = replace(run.distributions, e2e_s=[], tpot_s=[], tbt_counts=[0] * len(run.distributions.tbt_counts))
    series = replace(run.series, clock_mhz=[None] * len(run.series.time_s))
    keys = [plot.key for plot in all_plots([replace(run, distributions=empty, series=series)])]
    assert keys == ["energy", "attainment", "power"]


def test_the_promise_is_drawn_where_it_is() -> None:
    plots = {plot.key: plot for plot in all_plots(make_runs())}
    assert plots["e2e"].layout["shapes"][0]["x0"] == 16.0
    assert plots["tpot"].layout["shapes"][0]["x0"] == pytest.approx(200.0)
    assert plots["tpot"].layout["xaxis"]["range"][1] > 200


def test_bars_add_up_to_the_energy() -> None:
    runs = make_runs()
    work, idle = all_plots(runs)[0].data
    for run, serving_kj, idle_kj in zip(runs, work["x"], idle["x"], strict=True):
        assert serving_kj + idle_kj == pytest.approx(run.energy_j / 1e3, rel=1e-3)


def test_a_curve_is_thinned_and_keeps_its_ends() -> None:
    values, shares = curve([float(value) for value in range(10_000, 0, -1)])
    assert len(values) <= MOST_POINTS
    assert (values[0], shares[0]) == (1.0, 0.01)
    assert (values[-1], shares[-1]) == (10_000.0, 100.0)
    for value, share in zip(values, shares, strict=True):
        assert share == pytest.approx(value / 100)


def test_a_short_curve_is_whole_and_an_empty_one_is_empty() -> None:
    assert curve([3.0, 1.0, 2.0, 2.0]) == ([1.0, 2.0, 2.0, 3.0], [25.0, 50.0, 75.0, 100.0])
    assert curve([]) == ([], [])


def test_a_histogram_becomes_the_curve_at_its_upper_edges() -> None:
    assert counted_curve([0, 1, 2, 3, 4, 5], [0, 0, 1, 3, 0]) == ([2, 3, 4], [0, 25, 100])
    assert counted_curve([0, 1], [0]) == ([], [])
    values, shares = counted_curve([float(edge) for edge in range(2001)], [1] * 2000)
    assert len(values) <= MOST_POINTS
    assert (values[-1], shares[-1]) == (2000.0, 100.0)


def test_a_policy_keeps_its_colour_whatever_stands_beside_it() -> None:
    together = policy_inks([run.policy for run in make_runs()])
    assert policy_inks(["least-energy", "throttllem"]) == [together[2], together[1]]
    assert len({ink.light for ink in together}) == len(together)
    assert len({ink.dark for ink in together}) == len(together)


@pytest.mark.parametrize(("theme", "card"), [("light", "#ffffff"), ("dark", "#171c23")])
def test_every_colour_stands_out_from_the_page(theme: str, card: str) -> None:
    names = [run.policy for run in make_runs()] + ["fixed:700", "fixed:800", "fixed:900"]
    for name, colour in themes(names)[theme].items():
        if name.startswith("@policy") or name in {"@ink", "@soft", "@slo"}:
            assert contrast(colour, card) >= 3, (name, colour)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)
