"""What the keeper writes to its log, however often it is made to."""

import logging
from types import SimpleNamespace

from throttllem.keeper import __main__ as process
from throttllem.keeper.__main__ import SAY_S, UNSAID_S, seldom

AT_ONCE = round(UNSAID_S / SAY_S)


def line(kind, *arguments):
    return logging.LogRecord("throttllem.keeper", logging.INFO, "", 0, kind, arguments, None)


def test_of_each_kind_so_many_at_once_and_then_one_in_a_while(monkeypatch):
    now = SimpleNamespace(s=3.0)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: now.s))
    due_s = {}
    assert sum(seldom(due_s, line("a %s", number)) for number in range(1000)) == AT_ONCE
    assert seldom(due_s, line("b")), "another kind"
    said = 0
    for _ in range(1000):
        now.s += SAY_S / 10
        said += seldom(due_s, line("a %s", now.s))
    assert said == 100
    now.s += 1e6
    assert sum(seldom(due_s, line("a %s", number)) for number in range(1000)) == AT_ONCE, "no more after a long silence"
    assert set(due_s) == {"a %s", "b"}, "it remembers kinds, not lines"
