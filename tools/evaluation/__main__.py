"""`make evaluation`: the gateway in front of real engines. Tables into docs/evaluation, figures into out/evaluation.

`--only NAME,...` runs some of the parts, `--quick` a short form of each that writes nothing into docs. A part is a
module of this folder with `section(workspace) -> Section`; it is skipped where its engine or data is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tools.testbed.report import ROOT, MissingError, Section, Workspace, print_table, write_document, write_results

PARTS = (
    "clients",
    "identity",
    "differential",
    "scoreboard",
    "speculation",
    "triton",
    "cost",
    "overload",
    "faults",
    "quick",
    "new_user",
    "bounds",
)


def main() -> int:
    """0 if every part ran or was skipped; 1 if one failed, after the others."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluation", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a short form, not for figures")
    parser.add_argument("--engines", type=Path, default=ROOT / ".engines", help="environments of `make engines`")
    parser.add_argument("--out", type=Path, default=ROOT / "out/evaluation", help="folder of the JSON files")
    given = parser.parse_args()
    if unknown := sorted(set(given.only) - set(PARTS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(PARTS)}")
    console = Console(stderr=True, soft_wrap=True)
    failed = [name for name in given.only if not _run(name, given, console)]
    if failed:
        console.print(f"[red]failed[/]: {', '.join(failed)}")
    return 1 if failed else 0


def _run(name: str, given: argparse.Namespace, console: Console) -> bool:
    began_s = time.monotonic()

    def report(text: str) -> None:
        console.print(f"{time.monotonic() - began_s:6.0f} s  {name}: {text}", highlight=False, markup=False)

    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        workspace = Workspace(engines=given.engines, folder=Path(folder), report=report, quick=given.quick)
        try:
            found: Section = importlib.import_module(f"tools.evaluation.{name}").section(workspace)
        except MissingError as error:
            report(f"skipped: {error}")
            return True
        except Exception:
            console.print_exception()
            return False
    write_results(found, given.out / f"{name}.json")
    if not given.quick:
        command = f"python -m tools.evaluation --only {name}"
        write_document(found, ROOT / "docs/evaluation" / f"{name}.md", command=command)
    for table in found.tables:
        print_table(table, console)
    return True


if __name__ == "__main__":
    sys.exit(main())
