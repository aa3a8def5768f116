"""The keeper's log, at a bounded rate: clients cause most of its lines, and may not fill the disk with them."""

import logging
import math
import time

log = logging.getLogger("throttllem.keeper")

BURST_LINES = 50
LINE_PERIOD_S = 5.0


class RateLimit(logging.Filter):
    """Of each kind of line (its format string: there are few) passes BURST_LINES at once, then one every LINE_PERIOD_S.

    This is a token bucket with one number for each kind: the time at which its next line would be due if lines came one
    a period. That time lies up to a burst in the past; a line passes unless it lies in the future.
    """

    def __init__(self) -> None:
        super().__init__()
        self.due_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line passes."""
        now_s = time.monotonic()
        due_s = max(self.due_s.get(record.msg, -math.inf), now_s - BURST_LINES * LINE_PERIOD_S)
        passes = due_s < now_s
        self.due_s[record.msg] = due_s + LINE_PERIOD_S if passes else due_s
        return passes
