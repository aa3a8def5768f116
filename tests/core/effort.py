"""How much Python a call runs: lines executed, so that O(1) can be asserted without a clock."""

import sys
from collections.abc import Callable
from typing import Any


def lines_executed(call: Callable[[], Any]) -> int:
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count
