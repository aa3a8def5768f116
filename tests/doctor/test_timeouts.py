"""Calls that do not return are abandoned."""

import threading
import time

import pytest

from throttllem.doctor.timeouts import call_all, call_within


def test_each_call_has_its_result_its_error_or_its_timeout():
    wait = threading.Event()
    begun_s = time.monotonic()
    found = call_all({"fine": lambda: 1, "wrong": lambda: 1 / 0, "late": wait.wait, "nothing": lambda: None}, 0.1)
    assert time.monotonic() - begun_s < 1
    assert (found["fine"], found["nothing"]) == (1, None)
    assert isinstance(found["wrong"], ZeroDivisionError)
    assert isinstance(found["late"], TimeoutError)
    assert list(found) == ["fine", "wrong", "late", "nothing"]
    wait.set()


def test_one_call():
    wait = threading.Event()
    assert call_within(1.0, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_within(1.0, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match=r"has not returned for 0\.05 s"):
        call_within(0.05, wait.wait)
    wait.set()
