"""`make evaluation`: the gateway in front of real engines. Tables into docs/evaluation, figures into out/evaluation.

`--only NAME,...` runs some of the parts, `--quick` a short form of each that writes nothing into docs. A part whose
engine or data is not on this machine is skipped, and it is said.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from tools.evaluation.document import write_document, write_results
from tools.evaluation.machine import machine
from tools.evaluation.section import ROOT, MissingError, Section, Workshop

PARTS = ("clients", "identity", "scoreboard", "triton", "cost", "overload", "faults")


def main() -> int:
    """0 if every part ran or was skipped; 1 if one failed, after the others."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluation", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a short form, not for figures")
    parser.add_argument("--engines", type=Path, default=ROOT / ".engines", help="environments of `make engines`")
    parser.add_argument("--out", type=Path, default=ROOT / "out/evaluation", help="folder of the JSON files")
    asked = parser.parse_args()
    if unknown := sorted(set(asked.only) - set(PARTS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(PARTS)}")
    console = Console(stderr=True, soft_wrap=True)
    failed = [name for name in asked.only if not _run(name, asked, console)]
    if failed:
        console.print(f"[red]failed[/]: {', '.join(failed)}")
    return 1 if failed else 0


def _run(name: str, asked: argparse.Namespace, console: Console) -> bool:
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began:6.0f} s  {name}: {text}", highlight=False, markup=False)

    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        workshop = Workshop(engines=asked.engines, folder=Path(folder), say=say, quick=asked.quick)
        try:
            found: Section = importlib.import_module(f"tools.evaluation.{name}").section(workshop)
        except MissingError as error:
            say(f"skipped: {error}")
            return True
        except Exception:
            console.print_exception()
            return False
    _keep(found, name, asked)
    _print(found, console)
    return True


def _keep(found: Section, name: str, asked: argparse.Namespace) -> None:
    described = machine()
    write_results(found, asked.out / f"{name}.json", machine=described)
    if not asked.quick:
        command = f"python -m tools.evaluation --only {name}"
        write_document(found, ROOT / "docs/evaluation" / f"{name}.md", machine=described, command=command)


def _print(found: Section, console: Console) -> None:
    for table in found.tables:
        grid = Grid(*table.head, title=table.caption)
        for row in table.rows:
            grid.add_row(*row)
        console.print(grid)


if __name__ == "__main__":
    sys.exit(main())
