"""Tasks in processes: order, progress, failures, and that a stop ends tasks that report nothing."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from throttllem.sim.parallel import side_by_side

FOREVER_S = 600.0
SOON_S = 60.0
"""Far above what a stop takes, far below what the tasks would."""


def divided(number, by, report):
    report(0.5)
    return number // by


def lasting(path, report):
    """Writes that it began, works without a report, and cleans up when it is ended."""
    path.write_text("began")
    try:
        end = time.monotonic() + FOREVER_S
        while time.monotonic() < end:
            pass
    finally:
        path.write_text("ended")


def failing_after(paths, report):
    while not all(path.exists() for path in paths):
        time.sleep(0.01)
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_in_order_and_every_share_ends_at_one(workers):
    seen = {}
    tasks = [partial(divided, number, 2) for number in range(5)]
    assert side_by_side(tasks, workers=workers, progress=seen.__setitem__) == [0, 0, 1, 1, 2]
    assert seen == dict.fromkeys(range(5), 1.0)


def test_nothing_to_do_is_done():
    assert side_by_side([], workers=2) == []


def test_one_task_runs_here_and_every_report_arrives():
    reports = []
    side_by_side([partial(divided, 4, 2)], workers=2, progress=lambda *report: reports.append(report))
    assert reports == [(0, 0.5), (0, 1.0)]


def test_a_failure_ends_the_other_tasks_and_begins_none(tmp_path):
    """The first task reports nothing for a minute; the second one fails."""
    first, third = tmp_path / "first", tmp_path / "third"
    tasks = [partial(lasting, first), partial(failing_after, [first]), partial(lasting, third)]
    began_s = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        side_by_side(tasks, workers=2)
    assert time.monotonic() - began_s < SOON_S
    assert first.read_text() == "ended"
    assert not third.exists() or third.read_text() == "ended"


SCRIPT = """
import signal, sys
from functools import partial
from pathlib import Path
sys.path[:0] = {path!r}
from sim.test_parallel import lasting
from throttllem.sim.parallel import side_by_side

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    side_by_side([partial(lasting, Path(name)) for name in {names!r}], workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_stop(how, tmp_path):
    """Three tasks and two workers: the third waits in the workers' queue, and must not begin once they are stopped."""
    files = [tmp_path / name for name in "abc"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=sys.path, names=[str(file) for file in files]))
    # All that the process starts holds the pipe, so its end is theirs.
    with subprocess.Popen(
        [sys.executable, script], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until(lambda: all(file.exists() for file in files[:2]))
            process.send_signal(how)
            process.communicate(timeout=SOON_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert [file.read_text() for file in files[:2]] == ["ended"] * 2
    assert not files[2].exists()


def until(holds):
    end = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < end, "it never began"
        time.sleep(0.02)
