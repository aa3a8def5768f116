import numpy as np
import pytest

from throttllem.calibrate.errors import Errors, held_out


def test_signs_do_not_cancel() -> None:
    found = Errors.of([[0.1, -0.3], [0.2, 0.0]])
    assert (found.count, found.worst) == (4, 0.3)
    assert found.mean == pytest.approx(0.15)
    assert found.median == pytest.approx(0.15)


@pytest.mark.parametrize("bad", [[], [0.1, float("nan")], [float("inf")]])
def test_no_figure_from_nothing(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Errors.of(bad)


def test_a_fold_never_sees_its_own_group() -> None:
    seen: list[set[int]] = []

    def fit(points: list[tuple[int, float]]) -> float:
        seen.append({group for group, _ in points})
        return float(np.mean([value for _, value in points]))

    points = [(1, 1.0), (2, 2.0), (1, 3.0)]
    found = held_out(points, lambda p: p[0], fit, lambda mean, left: np.array([mean / value - 1 for _, value in left]))
    assert seen == [{2}, {1}]
    assert found.tolist() == [1.0, 2 / 3 - 1, 0.0]
