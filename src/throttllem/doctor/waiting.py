"""Calls that may never come back: made side by side in threads that nobody waits for longer than he wants to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")
Found = TypeVar("Found")


def side_by_side(calls: Mapping[Name, Callable[[], Found]], limit_s: float) -> dict[Name, Found | Exception]:
    """What each returned or raised; TimeoutError for one that has not come back by then. Its thread is left behind."""
    done = dict[Name, Found | Exception]()

    def make(name: Name, call: Callable[[], Found]) -> None:
        try:
            done[name] = call()
        except Exception as error:
            done[name] = error

    threads = [threading.Thread(target=make, args=pair, daemon=True) for pair in calls.items()]
    for thread in threads:
        thread.start()
    ends_s = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, ends_s - time.monotonic()))
    late = TimeoutError(f"a call of the driver has not come back for {limit_s:g} s")
    return {name: done.get(name, late) for name in calls}


def within(limit_s: float, call: Callable[[], Found]) -> Found:
    """What it returns. Raises what it raises, and TimeoutError if it does not come back in time."""
    result = side_by_side({None: call}, limit_s)[None]
    if isinstance(result, Exception):
        raise result
    return result
