"""One cell under one policy: which requests met their SLO, in the order in which they ended, and the joules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from throttllem.arena.cell_run import CellRun, cell_run
from throttllem.arena.cells import Cell, Engine
from throttllem.core.clocks.policy import parse_policy
from throttllem.core.controller import Controller
from throttllem.core.forecast.margins import Margins
from throttllem.core.types import Slo
from throttllem.physics.catalogue import Catalogue
from throttllem.sim.driver import Simulation
from throttllem.sim.recorder import Life, Recorder
from tools.shifts.cells import SEED, ShiftCell, cell

TOLERATED = 2.0
"""Violations beyond what is allowed that chance alone makes."""
BASELINE, FIXED, LEARNED = "triton", "fixed margins", "learned margins"
VARIANTS = (BASELINE, FIXED, LEARNED)
"""The maximum clock, and `least-energy` with margins that stay as they begin, and with learned ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run. `attainment` of served requests: all, and those that ended after the shift. `excess`: violations above
    what is allowed in the worst window of any length. `back`: the longest stretch of requests over which more than
    TOLERATED of them were owed.
    """

    cell: ShiftCell
    variant: str
    asked: float
    requests: int
    attainment: float
    after: float
    excess: float
    back: int
    energy_j: float


def run(number_cell: ShiftCell, seed: int, catalogue: Catalogue, cache_dir: Path) -> list[Measured]:
    """All variants of one cell."""
    gpu, model, tp = number_cell.engine
    engine = Engine(name=f"{gpu}-{model}", gpu=gpu, model=model, tp=tp)
    cell = Cell(group="shift", engine=engine, load=number_cell.load)
    prepared = cell_run(cell, seed + number_cell.number, catalogue, cache_dir)
    return [_run(number_cell, prepared, variant) for variant in VARIANTS]


def _run(cell: ShiftCell, prepared: CellRun, variant: str) -> Measured:
    scenario = replace(prepared.scenario, slo=replace(prepared.scenario.slo, attainment=Slo().attainment))
    clocks = scenario.fleet.clocks_mhz
    policy = parse_policy("triton" if variant == BASELINE else "least-energy", clocks, scenario.fleet.sizes)
    controller = scenario.controller(policy)
    if variant == FIXED:
        held = replace(controller.state(), margins=Margins(clocks=False))
        controller = Controller.from_state(controller.options, held)
    machine = replace(scenario.machine(), shifts=cell.shifts(clocks))
    recorder = Recorder(bin_s=60.0, keep_lives=True)
    simulation = Simulation(controller, machine, recorder, seed=scenario.seed)
    simulation.run(cell.requests(scenario.requests()), scenario.largest)
    ended = sorted(
        (life for life in recorder.lives.values() if life.ended_s is not None), key=lambda one: one.ended_s or 0
    )
    met = [_met(life) for life in ended]
    after = [one for life, one in zip(ended, met, strict=True) if (life.ended_s or 0.0) >= cell.at_s]
    owing = list(owed(met, 1.0 - scenario.slo.attainment))
    idle_w = scenario.fleet.specs[scenario.largest].idle_w
    return Measured(
        cell=cell,
        variant=variant,
        asked=scenario.slo.attainment,
        requests=len(met),
        attainment=sum(met) / max(1, len(met)),
        after=sum(after) / max(1, len(after)),
        excess=max(owing, default=0.0),
        back=longest(value > TOLERATED for value in owing),
        energy_j=simulation.energy_j + idle_w * max(0.0, prepared.window_s - simulation.now_s),
    )


def _met(life: Life) -> bool:
    request, tokens = life.request, life.request.output_tokens or 1
    assert life.ended_s is not None and life.first_token_s is not None
    met = request.slo.met(
        e2e_s=life.ended_s - request.arrival_s,
        ttft_s=life.first_token_s - request.arrival_s,
        tbt_s=(life.ended_s - life.first_token_s) / max(1, tokens - 1),
    )
    return met is True


def measured_cell(number: int, cache_dir: Path, progress: Callable[[float], None]) -> list[Measured]:
    """One cell as a task of `side_by_side`, whose processes find it by the name of its module."""
    measured = run(cell(number, SEED), SEED, Catalogue.load(), cache_dir)
    progress(1.0)
    return measured


def owed(met: Iterable[bool], allowed: float) -> Iterator[float]:
    """Violations above `allowed` of the requests, in the worst window that ends with each of them."""
    here = 0.0
    for one in met:
        here = max(0.0, here + (not one) - allowed)
        yield here


def longest(holds: Iterable[bool]) -> int:
    """The longest stretch over which it holds."""
    return max((sum(1 for _ in group) for held, group in groupby(holds) if held), default=0)
