"""Fifty thousand short requests, hang-ups and failures among them: memory, tasks and descriptors stay flat."""

import asyncio

import pytest

from tools.evaluation.endurance import CLIENTS, endure

MIB = 2**20


@pytest.mark.slow
def test_nothing_grows(tmp_path):
    endured = asyncio.run(endure(tmp_path, 50_000, print))
    print(endured.answers, endured.left)
    for name in ("resident_bytes", "tasks", "descriptors"):
        print(name, endured.decile(name, 0), endured.decile(name, -1), endured.slope(name))
    assert endured.decile("resident_bytes", -1) - endured.decile("resident_bytes", 0) < 8 * MIB
    assert endured.slope("resident_bytes") * 50_000 < 8 * MIB
    early, late = endured.left
    assert late - early < 1_000, endured.left
    assert endured.decile("tasks", -1) < 3 * CLIENTS  # what one in a thousand requests left would be as many again
    assert endured.decile("descriptors", -1) < 1.2 * endured.decile("descriptors", 0)
    assert not [said for said in endured.answers if "internal" in said], endured.answers
