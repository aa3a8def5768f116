import io

import pytest
from rich.console import Console

from throttllem.report.output import show_results

from .factory import make_run

CALIBRATED = {"kind": "calibrated", "clocks_mhz": [840, 1410], "why": ""}


@pytest.mark.parametrize(
    ("reach", "line"),
    [
        (CALIBRATED, "watts calibrated from 840 to 1410 MHz."),
        (
            CALIBRATED | {"clocks_mhz": [1200, 1410]},
            "watts calibrated from 1200 to 1410 MHz (modelled where throttllem ran).",
        ),
        (
            CALIBRATED | {"kind": "modelled", "why": "tp 8 is not among 4"},
            "watts are modelled, not measured (tp 8 is not among 4).",
        ),
    ],
)
def test_says_what_the_simulated_gpu_rests_on(reach: dict[str, object], line: str) -> None:
    scenario = {"engines": [{"physics": {"seconds": CALIBRATED, "watts": reach}}]}
    console = Console(file=io.StringIO(), width=400)
    show_results(scenario, [make_run("triton"), make_run("throttllem", energy=0.7)], console)
    assert console.file.getvalue().rstrip().endswith(f"Simulated GPU: seconds calibrated from 840 to 1410 MHz; {line}")
