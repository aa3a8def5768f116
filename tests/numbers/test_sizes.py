"""Sizes in simulation: which static engine counts, what a row shows, and the days that are made from recorded rates."""

import csv
from pathlib import Path

import numpy as np
import pytest
from report.factory import make_run

from throttllem.physics.catalogue import Catalogue
from throttllem.report.metrics import ATTAINMENT_SLACK
from tools.numbers import sizes
from tools.testbed.report import MissingError

BASELINE = make_run("triton", attainment=0.989)
BINS_A_DAY = 144


def static(energy, attainment):
    return make_run("fixed", energy=energy, attainment=attainment)


def test_the_best_static_engine_is_the_one_of_least_energy_within_half_a_point():
    late, half_a_point_late, costly = static(0.5, 0.9839), static(0.7, 0.989 - ATTAINMENT_SLACK), static(0.9, 0.999)
    assert sizes.best_static(BASELINE, [costly, half_a_point_late, late]) is half_a_point_late
    assert sizes.best_static(BASELINE, [late, costly]) is costly


def test_a_row_shows_the_share_of_time_at_each_size_where_the_size_changes():
    row = dict(zip(sizes.HEAD, sizes.row(make_run("throttllem+autoscale", energy=0.6), BASELINE), strict=True))
    # TP 4 for 600 s, TP 2 for 600 s, TP 4 for 600 s.
    assert (row["changes"], row["% of time at TP 1, 2, 4"]) == ("2", "0, 33, 67")
    assert (row["policy"], row["against `triton`"], row["energy kJ"]) == ("`throttllem+autoscale`", "−40.0 %", "367")


def test_a_static_engine_and_the_baseline_leave_cells_empty():
    row = sizes.row(static(0.9, 0.989), BASELINE)
    assert (row[0], row[2], row[-2:]) == ("fixed", "−10.0 %", ("", ""))
    assert sizes.row(BASELINE, BASELINE)[2] == ""


def write(file, head, rows):
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([head, *rows])


def recorded(folder):
    """Traces as they lie in the reference data: eight days of rates, of which the sixth to the eighth are taken, and
    requests only in the second hour of each.
    """
    traces = folder / "traces"
    traces.mkdir()
    chat = [(100 + number, 10 + number) for number in range(20)]
    for name in ("azure_llm_2023_conv_first_half.csv", "azure_llm_2023_code.csv"):
        write(traces / name, ("ContextTokens", "GeneratedTokens"), chat)
    rates = [(8.0 if day < 5 else 2.0) * (6 <= bin_ < 12) for day in range(8) for bin_ in range(BINS_A_DAY)]
    write(traces / "servegen_m_small_rate_10min.csv", ("rate_rps",), [(rate,) for rate in rates])
    return {tuple(map(str, lengths)) for lengths in chat}


def test_days_of_a_recorded_rate_keep_its_hours_and_take_their_lengths_from_chat(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "DATA", tmp_path)
    lengths = recorded(tmp_path)
    *_, days = sizes.scenes(tmp_path)
    with Path(days.trace).open(newline="") as rows:
        found = list(csv.DictReader(rows))
    arrivals_s = np.array([float(row["arrival_s"]) for row in found])
    assert (np.diff(arrivals_s) >= 0).all() and set((arrivals_s // sizes.DAY_S).tolist()) == {0.0, 1.0, 2.0}
    # A day of 24 h takes an hour here, so its second hour takes 150 s, at 4 requests/s: 1,800 in three days.
    of_day_s = arrivals_s % sizes.DAY_S
    assert ((of_day_s >= 150.0) & (of_day_s < 300.0)).all()
    assert len(found) == pytest.approx(1800, abs=4 * 1800**0.5)
    assert {(row["prompt_tokens"], row["output_tokens"]) for row in found} == lengths
    before = (tmp_path / "servegen-days.csv").read_bytes()
    sizes.scenes(tmp_path)
    assert (tmp_path / "servegen-days.csv").read_bytes() == before


def test_without_the_recorded_traces_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "DATA", tmp_path)
    with pytest.raises(MissingError, match=r"shared/data/traces"):
        sizes.scenes(tmp_path)


@pytest.mark.slow
def test_policies_and_every_size_at_every_static_clock_run_under_the_same_slos(tmp_path):
    jobs = sizes.prepared(
        sizes.Scene(title="a minute", trace="azure-conv-like:seconds=60,rate=1"), Catalogue.load(), tmp_path
    )
    policies, statics = jobs[: len(sizes.POLICIES)], jobs[len(sizes.POLICIES) :]
    assert [policy.name for _, policy in policies] == list(sizes.POLICIES)
    assert {scenario.slo for scenario, _ in jobs} == {policies[0][0].slo}
    assert policies[0][0].slo.attainment == 1.0 - ATTAINMENT_SLACK
    assert {scenario.fleet.sizes for scenario, _ in policies} == {sizes.SIZES}
    found = [(scenario.fleet.sizes, policy.fixed_mhz) for scenario, policy in statics]
    assert found == [((tp,), mhz) for tp in sizes.SIZES for mhz in sizes.STATIC_MHZ]
