"""Calls that do not come back hold nobody up."""

import threading
import time

import pytest

from throttllem.doctor.waiting import side_by_side, within


def test_each_has_its_result_its_error_or_its_delay():
    wait = threading.Event()
    begun_s = time.monotonic()
    found = side_by_side({"fine": lambda: 1, "wrong": lambda: 1 / 0, "late": wait.wait, "nothing": lambda: None}, 0.1)
    assert time.monotonic() - begun_s < 1
    assert (found["fine"], found["nothing"]) == (1, None)
    assert isinstance(found["wrong"], ZeroDivisionError)
    assert isinstance(found["late"], TimeoutError)
    assert list(found) == ["fine", "wrong", "late", "nothing"]
    wait.set()


def test_one_call():
    wait = threading.Event()
    assert within(1.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(1.0, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"has not come back for 0\.05 s"):
        within(0.05, wait.wait)
    wait.set()
