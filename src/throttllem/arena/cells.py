"""The grid: which engines, loads and SLOs the policies are compared on, and with which seeds.

A cell is data; `cell_run` makes a scenario of it. Knows nothing of policies.
"""

# Two grids. `JUDGING` is what docs/evaluation/arena.md reports; nothing may be tuned on it, and its seeds are used for
# nothing else. `TUNING` has other GPUs, models, loads and seeds: parameters that a policy has beforehand are set there.
# Every cell is about ten minutes of a generated trace. Its load is that of the busiest minute, as a share of the
# engine's maximum load under the cell's own SLOs (`sim.characterize`); its E2E SLO is the engine's own p99 there.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from throttllem.did_you_mean import did_you_mean

SECONDS = 600.0
"""Length of a cell's trace."""
TBT_S = 0.2
"""SLO on the mean time between the tokens of a request, where a cell has no tighter one."""
SLOW_SWITCH_S, FAST_SWITCH_S = 0.2, 0.005
"""Seconds until a clock is in force: the paper's 200 ms, and 5 ms, about the median of an A800 (arXiv 2502.20075)."""


ATTAINMENT = 0.997
"""What is asked of policies that control it: a policy may be half a point below the maximum clock, whose own violations
and chance are within that too."""


class Workload(StrEnum):
    """What the requests are: a generator, with or without an option; a day is as long as the trace.

    Of long prompts those above 8,000 tokens are left out: they take an engine for more than the second that a request
    may wait for a place in the batch, so a load under which two of them meet would count as too much.
    """

    CHAT = "azure-conv-like"
    CODE = "azure-code-like"
    LONG = "mooncake-like:longest=8000"
    DAY = "azure-conv-like:day"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine: `name` is how cells call it."""

    name: str
    gpu: str
    model: str
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One scenario. `load`: the busiest minute, as a share of the engine's maximum load (1: all of it).

    `length_error`: output lengths are known up to this error at p95 (None: they are predicted online).
    """

    group: str
    engine: Engine
    workload: Workload = Workload.CHAT
    load: float
    slo_tbt_s: float = TBT_S
    slo_ttft_s: float | None = None
    length_error: float | None = None
    switch_latency_s: float = SLOW_SWITCH_S

    @property
    def name(self) -> str:
        """Unique in its grid, as in `a100-13b-tp2/chat/50`."""
        parts = [self.engine.name, self.workload.name.lower(), f"{self.load * 100:.0f}"]
        parts += [f"tbt{self.slo_tbt_s * 1e3:.0f}ms"] if self.slo_tbt_s != TBT_S else []
        parts += [f"ttft{self.slo_ttft_s:g}s"] if self.slo_ttft_s is not None else []
        parts += [f"err{self.length_error * 100:.0f}"] if self.length_error is not None else []
        parts += [f"sw{self.switch_latency_s * 1e3:.0f}ms"] if self.switch_latency_s != SLOW_SWITCH_S else []
        return "/".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Cells and the seeds that belong to them: requests, noise and prediction errors follow from a seed."""

    name: str
    cells: tuple[Cell, ...]
    first_seed: int

    def seeds(self, number: int) -> tuple[int, ...]:
        """The first `number` seeds."""
        return tuple(range(self.first_seed, self.first_seed + number))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of the cells, in order."""
        return tuple(dict.fromkeys(cell.group for cell in self.cells))

    def matching(self, patterns: Sequence[str]) -> Grid:
        """The same grid with the cells whose name, or group, matches one of the patterns (`*` for any text).

        Raises ValueError for a pattern that matches none.
        """
        for pattern in patterns:
            if not any(_matches(cell, pattern) for cell in self.cells):
                near = did_you_mean(pattern, [*self.groups, *(cell.name for cell in self.cells)])
                raise ValueError(f"--cells {pattern}: no cell of the {self.name} grid matches; {near}")
        chosen = tuple(cell for cell in self.cells if any(_matches(cell, pattern) for pattern in patterns))
        return Grid(name=self.name, cells=chosen, first_seed=self.first_seed)


def _matches(cell: Cell, pattern: str) -> bool:
    return fnmatchcase(cell.name, pattern) or fnmatchcase(cell.group, pattern)


# ---- judging ---------------------------------------------------------------------------------------------------

_A100_13B_TP2 = Engine(name="a100-13b-tp2", gpu="a100-40gb-sxm", model="llama-2-13b", tp=2)
_A100_13B_TP4 = Engine(name="a100-13b-tp4", gpu="a100-40gb-sxm", model="llama-2-13b", tp=4)
_A100_8B_TP1 = Engine(name="a100-8b-tp1", gpu="a100-40gb-sxm", model="llama-3-8b", tp=1)
_H100_70B_TP4 = Engine(name="h100-70b-tp4", gpu="h100-80gb-sxm", model="llama-3-70b", tp=4)
_CHATTING = (_A100_13B_TP2, _A100_13B_TP4, _A100_8B_TP1, _H100_70B_TP4)
_A100_8B_LONG = Engine(name="a100-qwen8b-tp1", gpu="a100-80gb-sxm", model="qwen3-8b", tp=1)
_H100_72B_LONG = Engine(name="h100-qwen72b-tp4", gpu="h100-80gb-sxm", model="qwen2.5-72b", tp=4)


def _at_load(load: float) -> Iterable[Cell]:
    """Chat on every engine and a compressed day on two, with E2E SLOs."""
    group = f"{load * 100:.0f} %"
    yield from (Cell(group=group, engine=engine, load=load) for engine in _CHATTING)
    for engine in (_A100_13B_TP2, _H100_70B_TP4):
        yield Cell(group=group, engine=engine, workload=Workload.DAY, load=load)


def _tight_tbt() -> Iterable[Cell]:
    """About one and a half times the time of an iteration of this load at the maximum clock."""
    for engine, load, slo_tbt_s in (
        (_A100_13B_TP2, 0.5, 0.05),
        (_A100_13B_TP4, 0.5, 0.03),
        (_A100_13B_TP4, 1.0, 0.04),
        (_A100_8B_TP1, 0.5, 0.04),
        (_H100_70B_TP4, 0.5, 0.035),
    ):
        yield Cell(group="tight TBT", engine=engine, load=load, slo_tbt_s=slo_tbt_s)


def _first_token() -> Iterable[Cell]:
    """A TTFT SLO of 1 s; once with clocks that switch fast."""
    for engine in _CHATTING:
        for load in (0.5, 1.0):
            yield Cell(group="TTFT 1 s", engine=engine, load=load, slo_ttft_s=1.0)
    yield Cell(group="TTFT 1 s", engine=_H100_70B_TP4, load=0.5, slo_ttft_s=1.0, switch_latency_s=FAST_SWITCH_S)


def _long_prompts() -> Iterable[Cell]:
    for engine, load in ((_A100_8B_LONG, 0.5), (_A100_8B_LONG, 1.0), (_H100_72B_LONG, 0.5)):
        yield Cell(group="Mooncake", engine=engine, workload=Workload.LONG, load=load)


def _uncertain_lengths() -> Iterable[Cell]:
    for engine, load in ((_A100_13B_TP2, 0.25), (_A100_13B_TP4, 0.5), (_A100_8B_TP1, 0.5), (_H100_70B_TP4, 0.25)):
        yield Cell(group="length error 0.3", engine=engine, load=load, length_error=0.3)


JUDGING = Grid(
    name="judging",
    cells=(
        *_at_load(0.25),
        *_at_load(0.5),
        *_at_load(1.0),
        *(
            Cell(group="code", engine=engine, workload=Workload.CODE, load=load)
            for engine, load in ((_A100_13B_TP2, 0.25), (_A100_8B_TP1, 0.5), (_A100_13B_TP4, 1.0))
        ),
        *_long_prompts(),
        *_tight_tbt(),
        *_first_token(),
        *_uncertain_lengths(),
    ),
    first_seed=1001,
)

# ---- tuning ----------------------------------------------------------------------------------------------------

_H100_8B = Engine(name="h100pcie-8b-tp1", gpu="h100-80gb-pcie", model="llama-3-8b", tp=1)
_L40S_7B = Engine(name="l40s-7b-tp1", gpu="l40s-48gb", model="qwen2.5-7b", tp=1)
_H200_32B = Engine(name="h200-32b-tp2", gpu="h200-141gb-sxm", model="qwen2.5-32b", tp=2)
_A100_14B = Engine(name="a100-14b-tp2", gpu="a100-80gb-pcie", model="qwen2.5-14b", tp=2)

TUNING = Grid(
    name="tuning",
    cells=(
        *(Cell(group="15 %", engine=engine, load=0.15) for engine in (_H200_32B, _A100_14B)),
        *(Cell(group="40 %", engine=engine, load=0.4) for engine in (_H100_8B, _A100_14B)),
        Cell(group="40 %", engine=_H200_32B, workload=Workload.DAY, load=0.4),
        *(Cell(group="85 %", engine=engine, load=0.85) for engine in (_L40S_7B, _H200_32B)),
        Cell(group="code", engine=_A100_14B, workload=Workload.CODE, load=0.4),
        Cell(group="Mooncake", engine=_H200_32B, workload=Workload.LONG, load=0.6),
        Cell(group="tight TBT", engine=_A100_14B, load=0.6, slo_tbt_s=0.04),
        Cell(group="TTFT 1.5 s", engine=_H200_32B, load=0.6, slo_ttft_s=1.5),
        Cell(group="TTFT 1.5 s", engine=_A100_14B, load=0.9, slo_ttft_s=1.5),
        Cell(group="length error 0.2", engine=_H100_8B, load=0.6, length_error=0.2),
    ),
    first_seed=1,
)

GRIDS = {grid.name: grid for grid in (TUNING, JUDGING)}
"""The grids, as `--grid` names them."""
