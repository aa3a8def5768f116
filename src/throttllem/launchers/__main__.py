"""`python -m throttllem.launchers --ray auto --socket PATH`: starts engines on a Ray cluster for a gateway.

Needs Ray of the cluster's version, and of throttllem's dependencies none.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from throttllem.launchers.ray import ray_launcher
from throttllem.launchers.server import serve_launcher


def main() -> None:
    """Serve until a signal; engines go on."""
    parser = argparse.ArgumentParser(prog="python -m throttllem.launchers", description=__doc__)
    parser.add_argument("--ray", required=True, metavar="ADDRESS", help="the cluster; auto: that of this node")
    parser.add_argument("--socket", required=True, type=Path, metavar="PATH", help="where the gateway connects")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        asyncio.run(serve_launcher(ray_launcher(given.ray), given.socket))
    except ModuleNotFoundError as error:
        parser.error(f"{error}: install Ray, of the cluster's version, in the environment of {sys.executable}")
    except OSError as error:  # so are errors of the connection to the cluster
        parser.error(str(error))


if __name__ == "__main__":
    main()
