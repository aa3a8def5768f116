"""The compiled loops against numpy and plain Python, to the last bit, over random boards and tables."""

from dataclasses import fields

import numpy as np
import pytest

from core.forecast import plain
from core.toy import hull, sequence, spec
from throttllem.core.admission import _check_times, surely_fits
from throttllem.core.clocks.policy import feasible
from throttllem.core.external_load import ExternalLoad
from throttllem.core.forecast.horizon import Horizon, look_ahead
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.forecast.projection import project
from throttllem.core.scoreboard import Scoreboard
from throttllem.core.types import Reason, Slo

CLOCKS, FIRST = 24, 1000


def random_table(rng):
    """Bins of uneven width; seconds with all the digits that single precision has, watts too."""
    largest = {"batch_bin": (80, 0.1), "kv_bin": (4000, 0.005), "prefill_bin": (2000, 0.004)}
    bins = {name: np.cumsum(rng.random(size + 1) < share) for name, (size, share) in largest.items()}
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


def random_engine(rng, **changes):
    return spec(
        block_tokens=int(rng.choice([1, 4, 16, 64])),
        max_batch=int(rng.integers(30, 60)),
        prefill_budget_tokens=int(rng.integers(20, 1500)),
        chunked=bool(rng.random() < 0.5),
        **changes,
    )


def random_board(rng, engine, loose=1.0):
    """Up to 40 running and some pending requests, of one sequence each or not; some preempted, some overdue or lost."""
    board, most = Scoreboard(engine.block_tokens), int(rng.choice([1, 1, 3]))
    running, waiting = int(rng.integers(0, 40)), int(rng.integers(0, 5))
    for key in range(running + waiting):
        slo = Slo(
            e2e_s=loose * rng.uniform(5, 40) if rng.random() < 0.8 else None,
            tbt_s=rng.uniform(0.03, 0.1) if rng.random() < 0.3 else None,
            ttft_s=loose * rng.uniform(1, 5) if rng.random() < 0.3 else None,
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
    engine = random_engine(rng)
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
    (holds, run), (expected, binding) = (made(now, board, table, **times) for made in (feasible, plain.feasible))
    assert (holds.tolist(), run) == (expected.tolist(), binding)


def test_a_compiled_admission_equals_the_plain_one():
    """At the maximum clock; deadlines from hopeless to loose, so that every verdict comes up."""
    seen = {verdict for seed in range(200) for verdict in admissions(np.random.default_rng(seed))}
    reasons = {Reason.TBT, Reason.TTFT, Reason.E2E, Reason.OWN_DEADLINE, Reason.FITS}
    assert seen == reasons | {"within the bound", "beyond the bound"}


def admissions(rng):
    """What came of one newcomer, by the bound and by the projection, both ways."""
    engine = random_engine(rng, kv_blocks=20_000)
    board, table = random_board(rng, engine, loose=rng.uniform(0.3, 3.0)), random_table(rng)
    own = Slo(e2e_s=rng.uniform(1, 30), ttft_s=rng.uniform(0.1, 5), tbt_s=0.025 if rng.random() < 0.2 else None)
    new = sequence(999, 50, 200, slo=own, earliest=FIRST + int(rng.integers(0, 9)))
    base_s, delay_s, margin = float(rng.uniform(0, 3)), float(rng.choice([0.0, 0.2])), float(rng.choice([0.0, 0.05]))
    times = {"first": FIRST, "base_s": base_s, "delay_s": delay_s, "margin": margin}
    bound = [made(board, engine, table, new, **times) for made in (plain.surely_fits, surely_fits)]
    assert bound[0] == bound[1]
    yield "within the bound" if bound[0] else "beyond the bound"
    projection, alone = project(board, engine, first=FIRST, extra=new), len(board) == 0
    for patient in (True, False):
        expected, found = (
            made(
                look_ahead(board, engine, table, projection, base_s=base_s, extra=new),
                *(board, table, new, delay_s, margin),
                alone=alone,
                patient=patient,
            )
            for made in (plain.check_times, _check_times)
        )
        assert found == expected
        yield found.why
