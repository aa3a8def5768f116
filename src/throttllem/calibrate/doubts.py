"""What cannot be refused, as it may be so, and should be looked at before the result is believed.

Knows nothing of how doubts are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from throttllem.calibrate.fit import Fitted
from throttllem.calibrate.points import Point
from throttllem.physics.catalogue import Gpu

ODD_SPREADS = 3.0
"""A constant this far from its prior's middle is so by chance in one of 370."""
ONE_GPU_RATIO = 1.25
"""How near watts times the number of GPUs come to what is expected, where they are those of one."""


def one_gpu(points: Sequence[Point], law_w: NDArray[np.float64], like: str) -> Iterator[str]:
    """Engine sizes whose watts look like those of one of their GPUs; `law_w`: what `like` draws at each point."""
    ratio = np.array([point.watts for point in points]) / law_w
    for tp in sorted({point.tp for point in points} - {1}):
        middle = float(np.median([each for each, point in zip(ratio, points, strict=True) if point.tp == tp]))
        if 1 / ONE_GPU_RATIO < middle * tp < ONE_GPU_RATIO:
            yield f"at tp {tp} the watts are {middle:.2f} of what {tp} x {like} draw: watts of one GPU?"


def at_odds(fitted: Sequence[Fitted], like: str) -> Iterator[str]:
    """Constants that the measurements put further from the first guess than GPUs differ."""
    for one in fitted:
        spreads = abs(math.log(one.value / one.constant.start)) / one.constant.spread
        if one.determined and spreads > ODD_SPREADS:
            yield (
                f"{one.constant.path} is {one.value:.3g}, and {one.constant.start:.3g} was expected of a GPU like "
                f"{like}: {spreads:.1f} times the usual difference. Are the columns and --like right?"
            )


def seen_before(like: Gpu, file_name: str) -> Iterator[str]:
    """A first guess that was itself fitted to this profile."""
    if any(law.source.startswith(f"{fitted_to(file_name)},") for law in (like.time_basis, like.power_basis)):
        yield (
            f"{like.name} was itself fitted to {file_name}: the first guesses have seen what is held out here, whose "
            f"errors are too small. Name the GPU that {like.name} was started from with --like"
        )


def fitted_to(file_name: str) -> str:
    """How the source of a calibrated entry begins."""
    return f"fitted to {file_name}"
