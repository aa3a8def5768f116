"""Fake GPUs and keepers as in tests/keeper, and a doctor that examines them."""

import pytest

from tests.doctor.scenes import Ward
from tests.keeper.rig import folder, keeper, keepers, library, machine, nursery

__all__ = ["folder", "keeper", "keepers", "library", "machine", "nursery"]


@pytest.fixture
def ward(nursery, folder):
    return Ward(nursery, folder)
