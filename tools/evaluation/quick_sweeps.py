"""Quick against full on published sweeps of real GPUs: the laws fitted to a few of their clocks, and to all others.

The sweeps are those of tools/fidelity, which reads and fits them. Knows nothing of random GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from throttllem.physics.catalogue import Catalogue
from tools.fidelity import a40
from tools.fidelity.a100_fit import GPU, MODEL, Cell, Served, figures, keep_clocks, read_sweep, refit, without_clock
from tools.fidelity.kernel_law import COMPUTE, MEMORY, KernelRow, describe, freest, predict, read_kernels
from tools.testbed.report import DATA, Table

SWEEP_CLOCKS, SWEEP_BATCHES = (705, 900, 1110, 1410), (4, 16, 64)
"""Of eight clocks and five batch sizes: the lowest, two near the knees, the top."""
A40_RANGES = ((None, 285.0), *a40.FEW)
"""Of the ranges of the A40's clock."""
HEAD = ("measured", "fitted to", "held out", "rows", "median", "p95")
Errors = NDArray[np.float64]


def sweep_tables() -> tuple[Table, ...]:
    """Errors on what was held out, and joules at the clocks that each law takes for the cheapest; none without data."""
    if not DATA.is_dir():
        return ()
    catalogue = Catalogue.load()
    cells, kernels = read_sweep(DATA), read_kernels(DATA)
    gpu, model = catalogue.gpu(GPU), catalogue.model(MODEL)
    quick = refit(
        gpu,
        model,
        [cell for cell in cells if cell.clock_mhz in SWEEP_CLOCKS and cell.batch in SWEEP_BATCHES],
        keep_clocks(cells, kernels, _near)[1],
    ).law
    hidden = [cell for cell in cells if cell.clock_mhz not in SWEEP_CLOCKS]
    laws = {clock: refit(gpu, model, *without_clock(cells, kernels, clock)).law for clock in _clocks(hidden)}
    rows = [
        *_served("4 clocks x 3 batches", hidden, cells, lambda _: quick),
        *_served("the other 7 clocks x 5 batches", hidden, cells, lambda clock: laws[clock]),
        *_kernel_rows(quick, laws, kernels),
        *_a40_rows(catalogue),
    ]
    errors = Table(caption="Published sweeps of real GPUs, where the laws are only nearly right.", head=HEAD, rows=rows)
    whole = refit(gpu, model, cells, kernels).law
    return errors, _cheapest({"4 clocks x 3 batches": quick, "8 clocks x 5 batches": whole}, cells)


def _near(clock_mhz: int) -> bool:
    return any(abs(clock_mhz - each) <= 20 for each in SWEEP_CLOCKS)


def _clocks(cells: Sequence[Cell]) -> list[int]:
    return sorted({cell.clock_mhz for cell in cells})


def _served(
    name: str, hidden: Sequence[Cell], cells: Sequence[Cell], law_of: Callable[[int], Served]
) -> list[tuple[str, ...]]:
    """Slow-down to the top clock and watts; the seconds themselves depend on lengths that are not published."""
    top = max(cell.clock_mhz for cell in cells)
    tops = {cell.batch: cell for cell in cells if cell.clock_mhz == top}
    slow, watts = list[float](), list[float]()
    for cell in hidden:
        law = law_of(cell.clock_mhz)
        (ours,), (at_top,) = law.of([cell]), law.of([tops[cell.batch]])
        (measured,), (measured_top,) = figures([cell]), figures([tops[cell.batch]])
        slow.append((ours[0] / at_top[0]) / (measured[0] / measured_top[0]) - 1)
        watts.append(ours[1] / measured[1] - 1)
    where = f"{', '.join(map(str, _clocks(hidden)))} MHz"
    what = "A100-40GB, Llama-3.1-8B"
    return [_row(f"{what}: seconds over the clock", name, where, slow), _row(f"{what}: watts", name, where, watts)]


def _kernel_rows(quick: Served, laws: dict[int, Served], kernels: Sequence[KernelRow]) -> list[tuple[str, ...]]:
    """Both kernels at their highest power limit, at the clocks that neither fit saw."""
    rows = []
    for name, words in ((MEMORY, "memory-bound kernel"), (COMPUTE, "compute-bound kernel")):
        known = freest(kernels, name)
        hidden = [row for row in known if not _near(row.clock_mhz)]
        for fitted in ("4 clocks x 3 batches", "the other clocks"):
            found = []
            for row in hidden:
                full = laws[min((abs(clock - row.clock_mhz), clock) for clock in laws)[1]]
                gpu = (quick if fitted.startswith("4") else full).gpu
                seen = [each for each in kernels if each.kernel == name and each.clock_mhz != row.clock_mhz]
                time_s, power_w = predict(gpu, describe(gpu, seen, name), row.clock_mhz, row.limit_w)
                found.append((time_s / row.time_s - 1, power_w / row.power_w - 1))
            where = f"{', '.join(str(row.clock_mhz) for row in hidden)} MHz"
            for what, values in zip(("seconds", "watts"), zip(*found, strict=True), strict=True):
                rows.append(_row(f"A100, {words}: {what}", fitted, where, values))
    return rows


def _a40_rows(catalogue: Catalogue) -> list[tuple[str, ...]]:
    cells, gpu, model = a40.read_cells(DATA), catalogue.gpu(a40.GPU), catalogue.model(a40.MODEL)
    ranges = list(dict.fromkeys(cell.clock_mhz for cell in cells))
    hidden = [each for each in ranges if each not in A40_RANGES]
    few = a40.refit(gpu, model, [cell for cell in cells if cell.clock_mhz in A40_RANGES]).gpu
    quick, full = list[float](), list[float]()
    for each in hidden:
        chosen = [cell for cell in cells if cell.clock_mhz == each]
        others = a40.refit(gpu, model, [cell for cell in cells if cell.clock_mhz != each]).gpu
        quick += a40.errors(few, model, chosen).tolist()
        full += a40.errors(others, model, chosen).tolist()
    what, where = "A40, Llama-3.1-8B: watts", f"{len(hidden)} ranges of the clock"
    return [
        _row(what, f"{len(A40_RANGES)} of {len(ranges)} ranges", where, quick),
        _row(what, f"the other {len(ranges) - 1} ranges", where, full),
    ]


def _row(what: str, fitted: str, where: str, errors: Sequence[float]) -> tuple[str, ...]:
    found = np.abs(errors)
    return (what, fitted, where, str(found.size), f"{np.median(found):.1%}", f"{np.quantile(found, 0.95):.1%}")


def _cheapest(laws: dict[str, Served], cells: Sequence[Cell]) -> Table:
    """Measured joules at the clock of the sweep that a law takes for the cheapest, against the measured minimum."""
    rows = []
    for name, law in laws.items():
        for batch in sorted({cell.batch for cell in cells}):
            own = [cell for cell in cells if cell.batch == batch]
            joules = [cell.time_s * cell.power_w for cell in own]
            chosen = int(np.argmin(np.prod(law.of(own), axis=1)))
            best = int(np.argmin(joules))
            cost = joules[chosen] / joules[best] - 1
            rows.append((name, str(batch), str(own[chosen].clock_mhz), str(own[best].clock_mhz), f"{cost:+.1%}"))
    head = ("law fitted to", "batch", "its cheapest clock, MHz", "measured", "measured joules above the least")
    caption = "The A100 sweep: what the choice of the clock by each law costs, in measured joules."
    return Table(caption=caption, head=head, rows=rows)
