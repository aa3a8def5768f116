"""What the gateway adds to the first token, and tokens per core, in a minute: `make bench`. One core shows little.

`python -m tools.evaluation --only cost` is the long form, with LiteLLM's proxy and a real engine.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tools.evaluation.cost import LOADS, Round, added, make_tables, measure, median, paced
from tools.testbed.cores import real_time
from tools.testbed.report import Workspace

ROUNDS, SECONDS = 2, 4.0


def main() -> None:
    """Measure and print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        workspace = Workspace(engines=Path("nowhere"), folder=Path(name), report=print)
        engine, standing = paced(workspace, make_tables(workspace.folder, 5_000), stack)
        stack.enter_context(real_time(pid for proxy in standing for pid in proxy.pids()))
        for load in (LOADS[0], LOADS[2]):
            found = measure(standing, engine, load, ROUNDS, SECONDS, lambda _: None)
            print(f"first token through a proxy, {load.streams} streams: added to the direct way's")
            for proxy in standing[1:]:
                report(proxy.name, found[proxy.name], found["direct"])


def report(name: str, rounds: list[Round], way: list[Round]) -> None:
    """One line."""
    p50, p99 = added(rounds, way, lambda one: one.p50_ms), added(rounds, way, lambda one: one.p99_ms)
    pace = median(rounds, lambda one: one.tokens_per_cpu_s)
    print(f"  {name:10} p50 {p50:+6.2f} ms, p99 {p99:+6.2f} ms, {pace:8,.0f} tokens per core second")


if __name__ == "__main__":
    main()
