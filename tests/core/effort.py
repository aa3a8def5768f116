"""How much Python a call runs, so that its cost can be asserted without a clock: lines and calls of the package."""

import sys
from collections.abc import Callable
from typing import Any


def lines_executed(call: Callable[[], Any]) -> int:
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        # The garbage collector may call Hypothesis at any time.
        if not frame.f_globals.get("__name__", "").startswith("throttllem"):
            return trace
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def calls_executed(call: Callable[[], Any]) -> list[str]:
    """The files of the functions that a call enters, one for each time."""
    found: list[str] = []

    def profile(frame, event, argument):
        if event == "call" and "throttllem" in frame.f_code.co_filename:  # constructors of dataclasses have no file
            found.append(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
