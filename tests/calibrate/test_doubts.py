"""What is said, but not refused."""

from __future__ import annotations

import math

import numpy as np

from throttllem.calibrate.doubts import at_odds, fitted_to, one_gpu, seen_before
from throttllem.calibrate.fit import Constant, Fitted

from .synthetic import LIKE, measure

POINTS = measure(LIKE, sizes=(1, 2, 4))
LAW_W = np.array([point.watts for point in POINTS])


def test_watts_of_one_gpu_are_told_by_size():
    assert list(one_gpu(POINTS, LAW_W, "x")) == []
    halved = [point._replace(watts=point.watts / 2) if point.tp == 2 else point for point in POINTS]
    (said,) = one_gpu(halved, LAW_W, "x")
    assert said == "at tp 2 the watts are 0.50 of what 2 x x draw: watts of one GPU?"
    assert len(list(one_gpu([p._replace(watts=p.watts / p.tp) for p in POINTS], LAW_W, "x"))) == 2


def moved(spreads: float, error: float) -> Fitted:
    return Fitted(
        constant=Constant(path="power.core_w", start=200.0, spread=0.5),
        value=200.0 * math.exp(0.5 * spreads),
        error=error,
    )


def test_only_a_determined_constant_far_from_the_first_guess_is_at_odds():
    assert list(at_odds([moved(2.9, 0.1), moved(-2.9, 0.1), moved(-3.2, 0.4)], "x")) == []
    (said,) = at_odds([moved(-3.2, 0.1)], "x")
    assert said.startswith("power.core_w is 40.4, and 200 was expected of a GPU like x: 3.2 times the usual")


def test_a_first_guess_that_was_fitted_to_the_same_file():
    assert list(seen_before(LIKE, "p.csv")) == []
    source = LIKE.power_basis.model_copy(update={"source": f"{fitted_to('p.csv')}, 160 rows"})
    like = LIKE.model_copy(update={"power_basis": source})
    (said,) = seen_before(like, "p.csv")
    assert "was itself fitted to p.csv" in said and "--like" in said
    assert list(seen_before(like, "p.cs")) == []
