"""Calls that may never return, as those of a driver that hangs: made in threads that are abandoned after a timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")
Result = TypeVar("Result")


def call_all(calls: Mapping[Name, Callable[[], Result]], timeout_s: float) -> dict[Name, Result | Exception]:
    """Make calls in parallel. What each returned or raised; TimeoutError for one that has not returned in time."""
    done = dict[Name, Result | Exception]()

    def run(name: Name, call: Callable[[], Result]) -> None:
        try:
            done[name] = call()
        except Exception as error:
            done[name] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in calls.items()]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    late = TimeoutError(f"a call of the driver has not returned for {timeout_s:g} s")
    return {name: done.get(name, late) for name in calls}


def call_within(timeout_s: float, call: Callable[[], Result]) -> Result:
    """What the call returns. Raises what it raises, and TimeoutError if it does not return in time."""
    result = call_all({None: call}, timeout_s)[None]
    if isinstance(result, Exception):
        raise result
    return result
