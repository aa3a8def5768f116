from __future__ import annotations

import pytest

from throttllem.report.figure import Plot
from throttllem.report.plots import all_plots

from .factory import make_runs


@pytest.fixture(scope="session")
def plots() -> dict[str, Plot]:
    """The plots of `make_runs()` by key."""
    return {plot.key: plot for plot in all_plots(make_runs())}
