"""Processes that become ready or are reported with their log, and end with everything that they started."""

import sys
import time

import pytest

from tools.testbed.processes import ProcessError, completed, group, started

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready", flush=True)
time.sleep(60)
"""


def python(code):
    return [sys.executable, "-c", code]


def test_a_group_ends_with_its_block(tmp_path):
    log = tmp_path / "log"
    with started(python(PARENT), log, ready=lambda: log.exists() and "ready" in log.read_text()) as process:
        assert len(process.pids()) == 2
        assert process.cpu_s() >= 0.0
    assert group(process.pid) == []


@pytest.mark.parametrize(
    ("code", "why"),
    [("print('no port'); raise SystemExit(3)", "ended with status 3"), ("import time; time.sleep(60)", "is not ready")],
)
def test_a_process_that_does_not_become_ready_is_reported_and_ended(tmp_path, code, why):
    began_s = time.monotonic()
    never = started(python(code), tmp_path / "log", ready=lambda: False, within_s=0.5)
    with pytest.raises(ProcessError, match=why) as raised, never:
        raise AssertionError("never ready")
    assert ("no port" in str(raised.value)) == ("status 3" in why)
    assert time.monotonic() - began_s < 10


def test_a_command_runs_to_its_end_or_is_reported(tmp_path):
    assert completed(python("import sys; print('out'); print('err', file=sys.stderr)")) == ("out\n", "err\n")
    with pytest.raises(ProcessError, match="exit status 2\nbroken"):
        completed(python("import sys; print('broken'); sys.exit(2)"))
    with pytest.raises(ProcessError, match="not done after 0"):
        completed(python("import time; time.sleep(60)"), within_s=0.3)
