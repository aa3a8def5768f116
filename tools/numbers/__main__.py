"""`make numbers`: simulations whose figures the documentation shows, written into it.

`--only savings,estimate,claims,sizes` runs some of them. Each is deterministic but for decision times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from throttllem.config import Options
from throttllem.physics.catalogue import Catalogue
from tools.numbers import claims, estimate, savings, sizes
from tools.testbed.report import ROOT

PARTS = {"savings": savings.write, "estimate": estimate.write, "claims": claims.write, "sizes": sizes.write}


def main() -> None:
    """Run the chosen parts, in order."""
    parser = argparse.ArgumentParser(prog="python -m tools.numbers", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--workers", type=int, default=Options().workers, help="simulations side by side")
    chosen = parser.parse_args()
    if unknown := set(names := chosen.only.split(",")) - set(PARTS):
        parser.error(f"--only {chosen.only}: unknown {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    cache_dir: Path = Options().cache_dir.expanduser()
    for name in names:
        print(f"{name} ...", flush=True)
        PARTS[name](ROOT, Catalogue.load(), cache_dir, chosen.workers)


if __name__ == "__main__":
    main()
