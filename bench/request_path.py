"""How far one streamed request goes through the gateway: calls into the package, files, changes of file.

    python -m bench.request_path

An engine that sends a token every 0.4 s, `throttllem serve` in front of it with Python's profiler on, one stream of 12
tokens. Counted are the 0.1 s after the request and the time around the first chunk, and the time around each later
token (the median). Routine work that falls in there counts, too; it is shown as calls in an idle second. A generator
that is resumed counts as a call.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import throttllem
from tools.testbed.engines.openai_engine import MODEL, openai_engine
from tools.testbed.gateway import Gateway, gateway
from tools.testbed.processes import post

PACKAGE = str(Path(throttllem.__file__).parent)
TOKENS, GAP_S = 12, 0.4
ACCEPTED_S, BEFORE_S, AFTER_S = 0.1, 0.02, 0.04
"""After the request was sent; before and after a chunk arrived."""
WARM_UP, QUIET_S, FETCH_S = 2, 1.5, 10.0


class Call(NamedTuple):
    """One call into the package."""

    at_s: float
    file: str
    function: str


class Distance(NamedTuple):
    """How far something went."""

    calls: int
    files: int
    changes: int


# ---- inside the gateway --------------------------------------------------------------------------------------


def serve_noted(out: Path, arguments: list[str]) -> None:
    """`throttllem ARGUMENTS` with every call into the package noted; SIGUSR2 writes them to `out` and begins again."""
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(Call(time.monotonic(), frame.f_code.co_filename, frame.f_code.co_name))

    def write(*_: object) -> None:
        part = out.with_suffix(".part")
        part.write_text(json.dumps(calls))
        part.replace(out)
        calls.clear()

    signal.signal(signal.SIGUSR2, write)
    threading.setprofile(note)
    sys.setprofile(note)
    from throttllem.cli.app import main as command  # noqa: PLC0415 - after the profiler, as in a process of its own

    sys.argv = ["throttllem", *arguments]
    command()


# ---- outside -------------------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, Distance]:
    """The path to the first chunk and of one token, and the calls in an idle second."""
    calls = folder / "calls.json"
    with openai_engine(folder / "engine.log") as (engine, _):
        post(f"{engine}/pace", {"step_s": GAP_S, "first_s": GAP_S})
        command = (sys.executable, "-m", "bench.request_path", "--noted", str(calls), "serve")
        arguments = ("--engine", engine, "--set", "engines.0.max_batch=64")
        with gateway(arguments, folder / "gateway", command=command) as up:
            for _ in range(WARM_UP):  # what only the first requests do is not counted
                streamed(up.url)
            time.sleep(QUIET_S)
            fetched(up, calls)
            began_s = time.monotonic()
            time.sleep(GAP_S * TOKENS)
            idle = len(fetched(up, calls)) / (time.monotonic() - began_s)
            sent_s, chunks_s = streamed(up.url)
            time.sleep(AFTER_S)
            noted = fetched(up, calls)
    # The engine sleeps before its first token: what lies in between is the gateway's routine, not the request's.
    first = [call for call in noted if sent_s <= call.at_s <= sent_s + ACCEPTED_S or _near(call, chunks_s[0])]
    tokens = sorted(path_of([call for call in noted if _near(call, at_s)]) for at_s in chunks_s[2:-3])
    return {
        "first chunk": path_of(first),
        "one token": tokens[len(tokens) // 2],
        "idle second": Distance(round(idle), 0, 0),
    }


def path_of(calls: list[Call]) -> Distance:
    """Calls, different files, and how often a call is in another file than the one before."""
    changes = sum(one.file != other.file for one, other in pairwise(calls))
    return Distance(len(calls), len({call.file for call in calls}), changes)


def streamed(url: str) -> tuple[float, list[float]]:
    """One streamed completion: when it was sent, and when each chunk arrived (CLOCK_MONOTONIC)."""
    fields = {"model": MODEL, "prompt": "one two three", "max_tokens": TOKENS, "stream": True}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.connect()
    sent_s = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(fields), {"content-type": "application/json"})
    answer = connection.getresponse()
    chunks_s = []
    while line := answer.readline():
        if line.startswith(b"data:"):
            chunks_s.append(time.monotonic())
    connection.close()
    return sent_s, chunks_s


def fetched(up: Gateway, file: Path) -> list[Call]:
    """The calls since the last time."""
    up.process.handle.send_signal(signal.SIGUSR2)
    until_s = time.monotonic() + FETCH_S
    while not file.exists():
        if time.monotonic() > until_s:
            raise SystemExit(f"the gateway wrote no calls within {FETCH_S:.0f} s:\n{up.process.last_lines()}")
        time.sleep(0.05)
    found = [Call(*fields) for fields in json.loads(file.read_text())]
    file.unlink()
    return found


def _near(call: Call, at_s: float) -> bool:
    return at_s - BEFORE_S <= call.at_s <= at_s + AFTER_S


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.request_path", description=__doc__)
    parser.add_argument("--noted", type=Path, help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.noted:
        serve_noted(given.noted, rest)
        return
    with tempfile.TemporaryDirectory(prefix="path-") as folder:
        found = measured(Path(folder))
    print("the path of one streamed request through the gateway")
    for name, path in found.items():
        print(f"  {name:12} {path.calls:5} calls, {path.files:3} files, {path.changes:4} changes of file")


if __name__ == "__main__":
    main()
