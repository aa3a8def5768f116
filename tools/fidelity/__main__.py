"""`make fidelity`: every data set against the physics; tables to the terminal, tables and plots into docs/physics.md.

`--only NAME,...` runs some of the data sets and writes nothing. `--constants` prints what the fits give, as TOML.
Without the reference data it says so and ends well.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from throttllem.option_sources import load_options
from throttllem.physics.catalogue import Catalogue
from tools.fidelity.document import BEGIN, END, draw, markdown
from tools.fidelity.section import Section, Target
from tools.fidelity.terminal import print_section, print_verdict
from tools.testbed.report import DATA, replace_between

ROOT = Path(__file__).parents[2]
DOCUMENT, PICTURES = ROOT / "docs" / "physics.md", ROOT / "docs" / "fidelity"
ROUNDING = 0.01
SETS = ("operators", "quantised", "a100_serving", "kernels", "a40", "a100_run", "h100_load", "served", "idle")


def run(name: str, folder: Path | None) -> Section:
    """One data set, by its module's name; its pictures into `folder`. What comes back can cross processes."""
    catalogue = Catalogue.load()
    found: Section = importlib.import_module(f"tools.fidelity.{name}").section(DATA, catalogue)
    if found.constants:
        found = replace(found, targets=(*found.targets, shipped(found.constants, catalogue)))
    if folder is not None:
        draw(found, folder)
    return replace(found, plots=tuple(replace(plot, draw=_drawn) for plot in found.plots))


def shipped(constants: Mapping[str, Mapping[str, float]], catalogue: Catalogue) -> Target:
    """Whether the catalogue ships what the fit gives, to its three digits."""
    off = []
    for gpu, values in constants.items():
        for path, value in values.items():
            law, _, name = path.partition(".")
            ours = getattr(getattr(catalogue.gpu(gpu), law), name)
            if ours is None or abs(ours - value) > ROUNDING * abs(value):
                off.append(f"{gpu} {path} {ours}, fitted {value:.4g}")
    count = sum(map(len, constants.values()))
    return Target(
        what=f"the {count} constants that the catalogue ships are those of this fit",
        limit=f"{ROUNDING:.0%}",
        found="; ".join(off) or "all",
        met=not off,
    )


def _drawn(_: Figure) -> None:
    raise RuntimeError("this plot was drawn where it was made")


def main() -> int:
    """0 if the comparison was made or there is no data: a target that is missed is said, and stands in the document."""
    parser = argparse.ArgumentParser(prog="make fidelity", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(SETS)}")
    parser.add_argument("--constants", action="store_true", help="print the constants that the fits give")
    asked = parser.parse_args()
    console = Console()
    if not DATA.is_dir():
        console.print("fidelity: skipped: the reference data (../shared/data beside the checkout) is not here")
        return 0
    names = asked.only or SETS
    if unknown := sorted(set(names) - set(SETS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(SETS)}")
    folder = None if asked.only else PICTURES
    PICTURES.mkdir(exist_ok=True)
    console.print(f"{len(names)} data sets ...")
    with ProcessPoolExecutor(load_options().options.workers) as pool:
        futures = [pool.submit(run, name, folder) for name in names]
        sections = []
        for future in futures:
            sections.append(future.result())
            print_section(console, sections[-1], constants=asked.constants)
    if asked.only is None:
        replace_between(DOCUMENT, BEGIN, END, markdown(sections, PICTURES.name))
    print_verdict(console, sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
