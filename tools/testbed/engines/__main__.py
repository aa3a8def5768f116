"""Installs real engines: `python -m tools.testbed.engines vllm triton clients --into .engines`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.testbed.engines.install import ENVIRONMENTS, InstallError, install


def main() -> None:
    """Install what the command line names, all by default; exit status 1 and a reason if one cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tools.testbed.engines", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}; all if none is named")
    parser.add_argument("--into", type=Path, default=Path(".engines"), help="folder of the virtual environments")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(ENVIRONMENTS)}")
    for name in arguments.names or ENVIRONMENTS:
        try:
            install(name, arguments.into)
        except InstallError as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
