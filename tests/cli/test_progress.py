"""Progress on a terminal, in a pipe, and not at all."""

import os
import pty
import subprocess
import sys

import pytest

from throttllem.cli import progress as module
from throttllem.cli.progress import EVERY_S, progress


@pytest.fixture
def clock(monkeypatch):
    """What the time is: `clock[0]`, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_now_and_then(clock, capsys):
    with progress("preparing") as report:
        for second in range(int(3.5 * EVERY_S)):
            clock[0] = 100.0 + second
            report("training", second / 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training 25%", "training 50%", "training 75%"]


def test_a_short_command_prints_nothing(clock, capsys):
    with progress("preparing") as report:
        report("training", 1.0)
    assert capsys.readouterr() == ("", "")


def test_parallel_work_shares_a_line_and_what_has_ended_is_left_out(clock, capsys):
    with progress("preparing") as report:
        report("prepared", 1.0)
        report("triton", 0.5, "triton")
        clock[0] += EVERY_S
        report("least-energy", 0.25, "least-energy")
    assert capsys.readouterr().err == "triton 50%, least-energy 25%\n"


def test_quiet(clock, capsys):
    with progress("preparing", quiet=True) as report:
        clock[0] += 2 * EVERY_S
        report("training", 0.5)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_bars():
    code = (
        "from throttllem.cli.progress import progress\n"
        "with progress('preparing') as report:\n"
        "    report('prepared', 1.0)\n"
        "    report('triton', 0.5, 'triton')\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the terminal's other end is closed
                break
    os.close(ours)
    assert process.returncode == 0
    assert all(words in shown for words in (b"prepared", b"100%", b"triton", b"50%"))
