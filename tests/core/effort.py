"""How much Python a call runs: lines of ours executed, so that O(1) can be asserted without a clock."""

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
