"""`make shifts`: cells in which something changes under a policy, with margins that stay and with learned ones.

Writes docs/evaluation/guarantee.md. Deterministic; about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from throttllem.config import Options
from throttllem.sim.parallel import side_by_side
from tools.shifts import document
from tools.shifts.cells import CELLS, ENGINES, KINDS
from tools.shifts.measure import measured_cell
from tools.testbed.report import ROOT


def main() -> None:
    """Run the cells and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.shifts", description=__doc__)
    parser.add_argument("--cells", type=int, default=CELLS, help="how many; fewer than all write no page")
    parser.add_argument("--workers", type=int, default=Options().workers, help="cells side by side")
    chosen = parser.parse_args()
    cache_dir: Path = Options().cache_dir.expanduser()
    # One cell of each engine first: engines are characterised and trained once, not in every process.
    first = [measured_cell(number * len(KINDS), cache_dir, lambda _: None) for number in range(len(ENGINES))]
    print(f"{len(first)} engines are prepared", flush=True)
    done = [0.0] * chosen.cells

    def report(index: int, share: float) -> None:
        if share > done[index]:
            done[index] = share
            print(f"{sum(one == 1.0 for one in done)} of {chosen.cells} cells", flush=True)

    tasks = [functools.partial(measured_cell, number, cache_dir) for number in range(chosen.cells)]
    measured = [one for cells in side_by_side(tasks, workers=chosen.workers, progress=report) for one in cells]
    for row in document.rows(measured):
        print(" | ".join(row))
    if chosen.cells == CELLS:
        document.write(ROOT, measured)


if __name__ == "__main__":
    main()
