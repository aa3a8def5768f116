"""Outcomes and entries, made up."""

from throttllem.arena.cells import JUDGING
from throttllem.arena.contest import Entry
from throttllem.arena.outcome import Outcome

CELLS = JUDGING.cells[:3]


def outcome(energy_j=100.0, attainment=1.0, setting="made up"):
    return Outcome(
        setting=setting,
        energy_j=energy_j,
        attainment=attainment,
        requests=10,
        mean_clock_mhz=1000.0,
        clock_switches=3,
        ttft_p50_s=0.1,
        ttft_p99_s=0.2,
        tpot_p50_s=0.02,
        tpot_p99_s=0.03,
        e2e_p99_s=5.0,
        decision_p99_s=None,
        cpu_s=0.5,
    )


def entry(cell=CELLS[0], seed=1001, *, attainment=1.0, tried=(), **rows):
    """An entry whose baseline took 100 J; rows by name with "_" for "-", joules or (joules, attainment)."""
    found = {"triton": outcome(100.0, attainment)}
    for name, value in rows.items():
        joules, met = value if isinstance(value, tuple) else (value, attainment)
        found[name.replace("_", "-")] = outcome(joules, met)
    return Entry(
        cell=cell,
        seed=seed,
        slo_e2e_s=20.0,
        requests=10,
        window_s=620.0,
        baseline=found["triton"],
        bound_j=40.0 if "sched" in rows else None,
        rows=found,
        tried=dict(tried),
    )
