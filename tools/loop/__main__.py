"""`make loop`: the loop closed live without a GPU. Tables and a picture into docs/evaluation, figures into out/loop.

A real vLLM as fast as a modelled GPU at the clock that it has, the keeper, the gateway, aiperf; three policies in turn,
and the same in `throttllem simulate`. `--quick`: one short run, which only shows that the chain works.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tools.loop.bed import LoopError, opened
from tools.loop.document import PICTURE, section
from tools.loop.outcome import Found
from tools.loop.picture import draw
from tools.loop.plan import QUICK, Plan, load, words
from tools.loop.runs import ENGINE_S, ON, SIMULATE_S, TRAIN_S, Recorded, check, recorded, run_s, turns
from tools.loop.simulated import simulate, simulate_with
from tools.testbed.processes import ProcessError
from tools.testbed.report import (
    ROOT,
    MissingError,
    Section,
    Table,
    Workspace,
    print_table,
    version_of,
    write_document,
    write_results,
)
from tools.testbed.trace import write_mooncake

DOCUMENTS = ROOT / "docs/evaluation"
VERSIONS = (("vLLM", "vllm", "vllm"), ("aiperf", "clients", "aiperf"))
"""Name, environment, package."""
COLUMNS_SHOWN = 3


def main() -> int:
    """0 if the chain works; 1 if not, with what it did not do."""
    parser = argparse.ArgumentParser(prog="python -m tools.loop", description=__doc__)
    parser.add_argument("--rounds", type=int, help=f"of all policies in turn ({Plan().rounds})")
    parser.add_argument("--seconds", type=float, help=f"of the load ({Plan().seconds:g})")
    parser.add_argument("--tables", type=Path, help="of an earlier run: no profile is made")
    parser.add_argument("--quick", action="store_true", help="one short run, nothing is written into docs")
    parser.add_argument("--engines", type=Path, default=ROOT / ".engines", help="environments of `make engines`")
    parser.add_argument("--out", type=Path, help="folder of figures, logs and tables (out/loop; out/loop-quick)")
    given = parser.parse_args()
    given.out = given.out or ROOT / "out" / ("loop-quick" if given.quick else "loop")
    for number in (signal.SIGTERM, signal.SIGINT):  # a stop ends everything as Ctrl-C does, also in the background
        signal.signal(number, signal.default_int_handler)
    console, began_s = Console(stderr=True, soft_wrap=True), time.monotonic()

    def report(text: str) -> None:
        console.print(f"{time.monotonic() - began_s:6.0f} s  {text}", highlight=False, markup=False)

    try:
        with tempfile.TemporaryDirectory(prefix="loop-") as folder:
            _run(
                given, Workspace(engines=given.engines, folder=Path(folder), report=report, quick=given.quick), console
            )
    except (LoopError, MissingError, ProcessError) as error:
        report(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        report("stopped: everything that was started has ended")
        return 130
    return 0


def _run(given: argparse.Namespace, workspace: Workspace, console: Console) -> None:
    plan = QUICK if given.quick else Plan()
    plan = replace(plan, rounds=given.rounds or plan.rounds, seconds=given.seconds or plan.seconds)
    sent, todo, tables = load(plan), turns(plan), given.tables
    learn_s = TRAIN_S + plan.profile_s if tables is None else 0.0
    minutes = (ENGINE_S + learn_s + len(todo) * run_s(plan) + (0.0 if given.quick else SIMULATE_S)) / 60
    workspace.report(f"{len(todo)} runs of {words(sent)}: about {minutes:.0f} min in all")
    trace = write_mooncake(sent, workspace.folder / "trace.jsonl")
    simulated = {} if given.quick else simulate(trace, plan, workspace.folder)
    made = []
    try:
        with opened(workspace, plan) as bed:
            if tables is None:
                workspace.report(f"profile at {len(plan.clocks_mhz)} clocks and training: about {learn_s / 60:.0f} min")
                bed.learn()
            else:
                shutil.copytree(tables, bed.tables)
            for found in recorded(bed, sent, todo):
                made.append(found)
                if wrong := check(found, plan):
                    raise LoopError("; ".join(wrong))
        informed = {} if given.quick else simulate_with(workspace.folder / "tables", trace, plan, workspace.folder)
    finally:
        _keep(workspace.folder, given.out)
    runs = [found.run for found in made]
    _write(Found(plan=plan, sent=sent, runs=runs, simulated=simulated, informed=informed), made, given, console)


def _write(found: Found, made: list[Recorded], given: argparse.Namespace, console: Console) -> None:
    versions = {name: version_of(given.engines / where, package) for name, where, package in VERSIONS}
    found_section = section(found, versions)
    write_results(found_section, given.out / "loop.json")
    # Of each policy the last run: by then everything is warm.
    shown = {one.run.policy: one for one in made if one.run.clocks == ON}
    shown = {policy: shown[policy] for policy in found.plan.policies}
    draw(found, shown, (given.out if given.quick else DOCUMENTS) / PICTURE)
    if not given.quick:
        write_document(found_section, DOCUMENTS / "loop.md", command="make loop")
    _print(found_section, console)


def _print(section_: Section, console: Console) -> None:
    """The smaller tables, turned: they fit a terminal."""
    for table in section_.tables:
        if len(table.rows) <= COLUMNS_SHOWN:
            head, *rows = zip(table.head, *table.rows, strict=True)
            print_table(Table(caption=table.caption.partition(":")[0], head=head, rows=rows), console)


def _keep(folder: Path, out: Path) -> None:
    """What a look afterwards needs: tables, score card, logs, steps, the client's export."""
    wanted = ("*.log", "*.csv", "*.json*", "*.parquet", "tables/*", "*/*.log", "*/*.csv", "*/client/profile_export*")
    for file in {found for pattern in wanted for found in folder.glob(pattern) if found.is_file()}:
        target = out / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


if __name__ == "__main__":
    sys.exit(main())
