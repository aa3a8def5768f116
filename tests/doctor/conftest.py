"""Fake GPUs and keepers as in tests/keeper, and a doctor that examines them."""

import pytest

from tests.doctor.scenes import Ward
from tests.keeper.rig import folder, keeper, keepers, library, machine, processes

__all__ = ["folder", "keeper", "keepers", "library", "machine", "processes"]


@pytest.fixture
def ward(processes, folder):
    return Ward(processes, folder)
