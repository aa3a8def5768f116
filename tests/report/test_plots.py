from __future__ import annotations

from dataclasses import replace

import pytest

from throttllem.report.figure import Plot
from throttllem.report.plots import all_plots

from .factory import make_run, make_runs


def test_every_plot_is_there_with_a_summary(plots: dict[str, Plot]) -> None:
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


def test_the_slo_is_drawn_at_its_value(plots: dict[str, Plot]) -> None:
    assert plots["e2e"].figure.layout.shapes[0].x0 == 16.0
    assert plots["tpot"].figure.layout.shapes[0].x0 == pytest.approx(200.0)
    assert plots["tpot"].figure.layout.xaxis.range[1] > 200


def test_bars_add_up_to_the_energy(plots: dict[str, Plot]) -> None:
    work, idle = plots["energy"].figure.data
    for run, serving_kj, idle_kj in zip(make_runs(), work.x, idle.x, strict=True):
        assert serving_kj + idle_kj == pytest.approx(run.energy_j / 1e3, rel=1e-3)


def test_strips_share_one_x_axis_in_the_unit_of_the_longest_run(plots: dict[str, Plot]) -> None:
    clock = plots["clock"].figure
    assert {trace.xaxis for trace in clock.data} == {"x6"}
    assert [trace.yaxis for trace in clock.data] == ["y", "y2", "y3", "y4", "y5", "y6"]
    assert clock.layout.xaxis6.title.text == "minutes"
    assert clock.data[0].x[-1] == pytest.approx(1800 / 60, rel=0.01)
