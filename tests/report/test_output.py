import io
from dataclasses import replace

import pytest
from rich.console import Console

from throttllem.report.output import show_results

from .factory import make_run

CALIBRATED = {"kind": "calibrated", "why": "", "clocks_mhz": [840, 1410], "below_top": ""}


@pytest.mark.parametrize(
    ("reach", "said"),
    [
        (CALIBRATED, "watts calibrated from 840 to 1410 MHz."),
        (
            CALIBRATED | {"clocks_mhz": [1200, 1410], "below_top": "the clock's effect at tp 2 (fitted at 1)"},
            "watts calibrated from 1200 to 1410 MHz (modelled for 25% of throttllem's time; below the top clock "
            "modelled: the clock's effect at tp 2 (fitted at 1)).",
        ),
        (
            CALIBRATED | {"kind": "modelled", "why": "tp 8 is not among 4"},
            "watts modelled, not measured (tp 8 is not among 4).",
        ),
    ],
)
def test_says_what_the_simulated_gpu_rests_on(reach: dict[str, object], said: str) -> None:
    scenario = {"engines": [{"tp": 2, "physics": {"seconds": CALIBRATED, "watts": reach}}]}
    console = Console(file=io.StringIO(), width=400)
    top, lower = (
        replace(make_run(policy), busy_s_by_mhz=busy_s)
        for policy, busy_s in (("triton", {1410: 9.0}), ("throttllem", {900: 1.0, 1200: 2.0, 1410: 1.0}))
    )
    show_results(scenario, [top, lower], console)
    beginning = "Simulated GPU, TP 2: seconds calibrated from 840 to 1410 MHz; "
    assert console.file.getvalue().rstrip().endswith(beginning + said)
