"""An arena that does not come to its end."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from arena.made import outcome
from throttllem.arena import contest
from throttllem.arena.cells import TUNING, Grid
from throttllem.arena.contenders import BASELINE, field_of
from throttllem.arena.contest import Arena
from throttllem.arena.run_cache import RunCache
from throttllem.core.clocks.policy import parse_policy


def test_what_ran_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    triton = parse_policy(BASELINE, (1000, 1200), (1,))

    class Interrupted:
        def __init__(self, *_):
            self.cache = RunCache(folder=tmp_path, name="cell-1", inputs=None)

        def entry(self, _):
            self.cache.outcome(triton, lambda: outcome(setting="before"))
            raise KeyboardInterrupt

    monkeypatch.setattr(contest, "cell_run", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(contest, "_Runs", Interrupted)
    grid = Grid(name="one", cells=TUNING.cells[:1], first_seed=1)
    arena = Arena(grid=grid, seeds=(1,), field=field_of(BASELINE, str), catalogue=None, cache_dir=Path(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        arena.run(1)
    again = RunCache(folder=tmp_path, name="cell-1", inputs=None)
    assert again.outcome(triton, lambda: outcome(setting="again")).setting == "before"
