"""Machines of two A100s, and processes that call NVML."""

import os
from contextlib import ExitStack

import pytest

from tests.nvml.caller import Caller
from tools.nvml.machine import Machine, a100
from tools.nvml.part import SWITCH_MS


@pytest.fixture(scope="session")
def shared(nvml_library, tmp_path_factory):
    """One machine whose clocks take their time and one whose clocks switch at once, with a caller each."""
    folder = tmp_path_factory.mktemp("gpus")
    with ExitStack() as stack:
        pairs = []
        for name, switch_ms in (("machine", SWITCH_MS), ("quick", (0, 0))):
            made = Machine.create(folder / name, a100(2, switch_ms=switch_ms), library=nvml_library)
            machine = stack.enter_context(made)
            pairs.append((machine, stack.enter_context(Caller(machine))))
        yield pairs


@pytest.fixture
def machine(shared):
    return fresh(shared[0][0])


@pytest.fixture
def quick(shared):
    return fresh(shared[1][0])


@pytest.fixture
def caller(machine, shared):
    return again(shared[0][1])


@pytest.fixture
def quick_caller(quick, shared):
    return again(shared[1][1])


def fresh(machine):
    """As new, and to be written to by whoever runs the tests."""
    machine.reset()
    for gpu in machine.gpus:
        gpu.root_only(os.geteuid() == 0)
    return machine


def again(caller):
    """Another test may have taken the driver away."""
    caller("nvmlInit()")
    return caller


@pytest.fixture
def caller_of():
    """For those that will not survive, or differ."""
    with ExitStack() as stack:
        yield lambda machine, **options: stack.enter_context(Caller(machine, **options))
