"""What is known is not run again; what depends on other sources is."""

from dataclasses import replace

import pytest

from arena.made import outcome
from throttllem.arena import run_cache
from throttllem.arena.contenders import RIVALS
from throttllem.arena.run_cache import RunCache
from throttllem.core.clocks.policy import parse_policy


def policy(name):
    return parse_policy(name, (1000, 1200), (1,))


class Counting:
    def __init__(self):
        self.runs = 0

    def __call__(self):
        self.runs += 1
        return outcome(setting=f"run {self.runs}")


def cache(folder, inputs="cell"):
    return RunCache(folder=folder, name="cell-1", inputs=inputs)


def test_a_known_run_is_not_repeated(tmp_path):
    run = Counting()
    first = cache(tmp_path)
    found = first.outcome(policy("triton"), run)
    assert first.outcome(policy("triton"), run) == found
    first.save()
    second = cache(tmp_path)
    assert second.outcome(policy("triton"), run) == found
    assert run.runs == 1
    second.outcome(policy("fixed:1000"), run)
    cache(tmp_path, inputs="another cell").outcome(policy("triton"), run)
    assert run.runs == 3


def test_values_of_a_rival_are_told_apart(tmp_path):
    run, known = Counting(), cache(tmp_path)
    for value in RIVALS[0].values:
        known.outcome(RIVALS[0].policy(value), run)
    assert run.runs == len(RIVALS[0].values)


def test_policies_depend_on_sources_of_their_own(tmp_path, monkeypatch):
    """A change of our policy's sources repeats its runs alone."""
    run, known = Counting(), cache(tmp_path)
    for name in ("triton", "least-energy"):
        known.outcome(policy(name), run)
    known.save()
    before = run_cache._digest_of_sources
    monkeypatch.setattr(run_cache, "_digest_of_sources", lambda aware: "changed" if aware else before(False))
    changed = cache(tmp_path)
    changed.outcome(policy("triton"), run)
    assert run.runs == 2
    changed.outcome(policy("least-energy"), run)
    assert run.runs == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"key": 1}', '{"key": {"energy_j": 1.0}}'])
def test_a_damaged_file_is_made_again(tmp_path, text):
    (tmp_path / "cell-1.json").write_text(text)
    known = cache(tmp_path)
    known.outcome(policy("triton"), Counting())
    known.save()
    assert cache(tmp_path).outcome(policy("triton"), Counting()).setting == "run 1"


def test_an_arena_of_few_policies_keeps_the_runs_of_the_others(tmp_path):
    run, known = Counting(), cache(tmp_path)
    known.outcome(policy("least-energy"), run)
    known.save()
    few = cache(tmp_path)
    few.outcome(policy("triton"), run)
    few.save()
    cache(tmp_path).outcome(policy("least-energy"), run)
    assert run.runs == 2


def test_a_class_of_the_user_always_runs(tmp_path):
    """It may read other modules, files or the time, which no digest knows of."""
    run, known = Counting(), cache(tmp_path)
    mine = replace(policy("triton"), name="mine:Mine", own=Counting)
    known.outcome(mine, run)
    known.outcome(mine, run)
    assert run.runs == 2


def test_sources_are_told_apart():
    assert run_cache.tree() == run_cache._digest_of_sources(True) != run_cache._digest_of_sources(False)
