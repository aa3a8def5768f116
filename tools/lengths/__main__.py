"""`make lengths`: the length predictor over recorded answers; tables to the terminal, and into docs/lengths.md.

`--only WORD` runs the sets that have it in their title, and writes nothing. Without the reference data it says so and
ends well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table as Printed

from throttllem.option_sources import load_options
from tools.lengths.cost import costs
from tools.lengths.document import BEGIN, COST_HEAD, END, HEAD, Line, Table, cells, cost_cells, draw, markdown
from tools.lengths.replay import replay
from tools.lengths.sets import Set, sets
from tools.lengths.yardsticks import (
    INFLATION,
    Bucket,
    Hindsight,
    Learner,
    Limit,
    RunningMean,
    Yardstick,
    all_of,
    by_bucket,
    by_prompt,
)
from tools.testbed.report import DATA, replace_between

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENT, PICTURE = DOCS / "lengths.md", DOCS / "lengths.png"
EXCEED = (0.05, 0.1, 0.2)
DRAWN = "Azure chat, max_tokens 4,096"


def compare(chosen: Set) -> Table:
    """Every yardstick over one set."""
    lines = [Line(by=by, asked=asked, score=replay(chosen.asked, made)) for by, asked, made in _yardsticks(chosen)]
    return Table(title=chosen.title, in_time=chosen.in_time, lines=tuple(lines))


def _yardsticks(chosen: Set) -> Iterator[tuple[str, float | None, Yardstick]]:
    asked = chosen.asked
    published = asked[0].bucket is not None
    yield from (("Online", exceed, Learner(exceed)) for exceed in EXCEED)
    yield from (("Online, levels fixed", exceed, Learner(exceed, still=True)) for exceed in EXCEED)
    yield from (("hindsight, one quantile", exceed, Hindsight(asked, all_of, exceed)) for exceed in EXCEED)
    name, kind = ("hindsight, by bucket", by_bucket) if published else ("hindsight, by prompt length", by_prompt)
    yield from ((name, exceed, Hindsight(asked, kind, exceed)) for exceed in EXCEED)
    if published:
        yield "published bucket's upper edge", None, Bucket()
    yield f"running mean x {INFLATION}", None, RunningMean()
    yield "max_tokens", None, Limit()


def _print(console: Console, title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    printed = Printed(*head, title=title)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)


def main() -> int:
    """0, whatever the figures are: they stand in the document."""
    parser = argparse.ArgumentParser(prog="make lengths", description=__doc__)
    parser.add_argument("--only", default="", help="a word of the titles")
    only = parser.parse_args().only
    console = Console()
    if not DATA.is_dir():
        console.print("lengths: skipped: the reference data (../shared/data beside the checkout) is not here")
        return 0
    chosen = [one for one in sets(DATA) if only.lower() in one.title.lower()]
    tables = []
    with ProcessPoolExecutor(load_options().options.workers) as pool:
        for table in pool.map(compare, chosen):
            tables.append(table)
            _print(console, f"{table.title}: {table.about}", HEAD, [cells(line) for line in table.lines])
    if only:
        return 0
    cost = costs(chosen[0].asked)
    _print(console, "costs", COST_HEAD, [cost_cells(one) for one in cost])
    draw(next(table for table in tables if table.title == DRAWN), PICTURE)
    replace_between(DOCUMENT, BEGIN, END, markdown(tables, cost, PICTURE.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
