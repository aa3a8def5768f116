"""The rate of the keeper's log is bounded, however many lines clients cause."""

import logging
from types import SimpleNamespace

from throttllem.keeper import log
from throttllem.keeper.log import BURST_LINES, LINE_PERIOD_S, RateLimit


def line(kind, *arguments):
    return logging.LogRecord("throttllem.keeper", logging.INFO, "", 0, kind, arguments, None)


def test_each_kind_of_line_has_a_burst_and_then_a_period(monkeypatch):
    now = SimpleNamespace(s=3.0)
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now.s))
    limit = RateLimit()
    assert sum(limit.filter(line("a %s", number)) for number in range(1000)) == BURST_LINES
    assert limit.filter(line("b")), "another kind"
    passed = 0
    for _ in range(1000):
        now.s += LINE_PERIOD_S / 10
        passed += limit.filter(line("a %s", now.s))
    assert passed == 100
    now.s += 1e6
    burst = sum(limit.filter(line("a %s", number)) for number in range(1000))
    assert burst == BURST_LINES, "no more after a long silence"
    assert set(limit.due_s) == {"a %s", "b"}, "it remembers kinds, not lines"
