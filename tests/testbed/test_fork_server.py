"""Forked processes: their orders, logs, lines and ends."""

import contextlib
import json
import os
import select
import signal

import pytest

from tools.testbed.fork_server import fork_server


@pytest.fixture(scope="module")
def server():
    with fork_server("tests.testbed.roles") as made:
        yield made


@contextlib.contextmanager
def forked(server, role, folder, **order):
    made = server.fork(role, log=str(folder / "log"), environment={"WHERE": "here"}, **order)
    try:
        yield made
    finally:
        os.close(made.pidfd)
        made.control.close()


def test_an_order_is_carried_out_in_a_group_of_its_own(server, tmp_path):
    with forked(server, "speak", tmp_path, text="hello") as made:
        assert server.exit_code(made.pid, 10) == 0
    assert (tmp_path / "log").read_text() == "hello here True\n"


def test_lines_go_to_and_fro(server, tmp_path):
    with forked(server, "echo", tmp_path) as made:
        made.control.sendall(b'"there"\n')
        assert json.loads(made.control.makefile("rb").readline()) == {"got": "there"}
    assert server.exit_code(made.pid, 10) == 0


@pytest.mark.parametrize(("role", "code", "log"), [("fail", 1, "ValueError: this role is broken"), ("leave", 7, "")])
def test_ends_have_codes_and_errors_a_log(server, tmp_path, role, code, log):
    with forked(server, role, tmp_path) as made:
        assert server.exit_code(made.pid, 10) == code
        assert server.exit_code(made.pid, 0) == code
    assert log in (tmp_path / "log").read_text()


def test_a_process_that_stays_has_no_code_until_it_is_killed(server, tmp_path):
    with forked(server, "stay", tmp_path) as made:
        assert server.exit_code(made.pid, 0.05) is None
        os.kill(made.pid, signal.SIGKILL)
        assert server.exit_code(made.pid, 10) == -signal.SIGKILL


def test_a_process_whose_server_ended_before_it_began_ends(server, tmp_path):
    with forked(server, "orphan", tmp_path) as made:
        assert server.exit_code(made.pid, 10) == -signal.SIGKILL


def test_nothing_outlives_the_server(tmp_path):
    with fork_server("tests.testbed.roles") as made, forked(made, "stay", tmp_path) as stays:
        handle = os.pidfd_open(stays.pid)
    ended = select.select([handle], [], [], 10)[0]
    os.close(handle)
    assert ended, "a pidfd is readable when its process has ended"
