"""The compiled loops against numpy and plain Python, to the last bit, over random boards and tables."""

from dataclasses import fields

import numpy as np
import pytest

from core.forecast import plain
from core.toy import hull, sequence, spec
from throttllem.core.clocks.policy import feasible
from throttllem.core.external_load import ExternalLoad
from throttllem.core.forecast.horizon import Horizon, look_ahead
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import Slo

CLOCKS, FIRST = 24, 1000


def random_table(rng):
    """Bins of uneven width; seconds with all the digits that single precision has, watts too."""
    largest = {"batch_bin": 80, "kv_bin": 4000, "prefill_bin": 2000}
    bins = {name: np.cumsum(rng.random(size + 1) < 0.1) for name, size in largest.items()}
    bins = {name: (each - each[0]).astype(np.int32) for name, each in bins.items()}
    cells = int(np.prod([each[-1] + 1 for each in bins.values()]))
    clocks = tuple(range(300, 300 + 15 * CLOCKS, 15))
    faster = np.linspace(2.0, 1.0, CLOCKS)
    return PerformanceTable(
        clocks_mhz=clocks,
        seconds=(rng.uniform(0.01, 0.03, (cells, 1)) * faster * rng.uniform(0.9, 1.1, (cells, CLOCKS))).astype("f4"),
        watts=rng.uniform(50, 400, (cells, CLOCKS)).astype("f4"),
        hull=hull(spec(max_batch=60, kv_blocks=3000)),
        **bins,
    )


def random_board(rng, engine):
    """Up to 40 running and some pending requests, of one sequence each or not; some preempted, some overdue or lost."""
    board, most = Scoreboard(engine.block_tokens), int(rng.choice([1, 1, 3]))
    running, waiting = int(rng.integers(0, 40)), int(rng.integers(0, 5))
    for key in range(running + waiting):
        slo = Slo(
            e2e_s=rng.uniform(5, 40) if rng.random() < 0.8 else None,
            tbt_s=rng.uniform(0.03, 0.1) if rng.random() < 0.3 else None,
            ttft_s=rng.uniform(1, 5) if rng.random() < 0.3 else None,
        )
        new = sequence(
            key, int(rng.integers(1, 400)), int(rng.integers(1, 500)), slo=slo, sequences=int(rng.integers(1, most + 1))
        )
        new.earliest = FIRST if key < running else FIRST - 1 + int(rng.integers(0, 2) * (key - running))
        new.lost = rng.random() < 0.05
        board.dispatch(new)
        if key < running:
            board.begin(key, FIRST - int(rng.integers(1, 300)), float(rng.uniform(-5, 0)))
    if running and rng.random() < 0.3:
        board.preempt(0, FIRST)
    if rng.random() < 0.3:
        board.external = ExternalLoad(batch=int(rng.integers(-5, 9)), kv_blocks=int(rng.integers(-50, 90)))
    return board


@pytest.mark.parametrize("seed", range(60))
def test_compiled_loops_equal_the_plain_ones_to_the_last_bit(seed):
    rng = np.random.default_rng(seed)
    engine = spec(
        block_tokens=int(rng.choice([1, 4, 16, 64])),
        max_batch=int(rng.integers(30, 60)),
        prefill_budget_tokens=int(rng.integers(20, 900)),
        chunked=bool(rng.random() < 0.5),
    )
    board, table = random_board(rng, engine), random_table(rng)
    extra = sequence(999, 50, 200, slo=Slo(e2e_s=30.0, ttft_s=4.0), earliest=FIRST + 9) if rng.random() < 0.5 else None
    projections = [made(board, engine, first=FIRST, extra=extra) for made in (plain.project, project)]
    for name in ("batch", "kv_blocks", "prefill_tokens", "ends", "starts"):
        np.testing.assert_array_equal(*(getattr(projection, name) for projection in projections))
    projection = projections[0].replenished() if rng.random() < 0.5 else projections[0]
    if not projection.horizon:
        return
    base_s = float(rng.uniform(0, 3))
    then, now = (
        made(board, engine, table, projection, base_s=base_s, extra=extra) for made in (plain.look_ahead, look_ahead)
    )
    for field in fields(Horizon):
        np.testing.assert_array_equal(getattr(then, field.name), getattr(now, field.name), err_msg=field.name)
    times = {
        "delay_s": rng.uniform(0, 0.2, CLOCKS),
        "margin": float(rng.choice([0.0, 0.05])),
        "reserve": float(rng.choice([0.0, 0.05])),
        "stretch": rng.uniform(1.0, 1.5, CLOCKS) if rng.random() < 0.5 else 1.0,
    }
    assert_same(plain.feasible(now, board, table, **times), feasible(now, board, table, **times))


def assert_same(expected, found):
    assert found[0].tolist() == expected[0].tolist()
    assert found[1] == expected[1]
