import io
from dataclasses import replace

import pytest
from rich.console import Console

from throttllem.config import CostOptions
from throttllem.report.terminal import results_tables, show_results

from .factory import make_run, make_runs

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
def test_the_basis_of_the_simulated_gpu(reach: dict[str, object], said: str) -> None:
    scenario = {"batching": "an engine", "engines": [{"tp": 2, "physics": {"seconds": CALIBRATED, "watts": reach}}]}
    console = Console(file=io.StringIO(), width=400)
    top, lower = (
        replace(make_run(policy), busy_s_by_mhz=busy_s)
        for policy, busy_s in (("triton", {1410: 9.0}), ("throttllem", {900: 1.0, 1200: 2.0, 1410: 1.0}))
    )
    show_results(scenario, [top, lower], console)
    beginning = "Simulated GPU, TP 2: seconds calibrated from 840 to 1410 MHz; "
    assert console.file.getvalue().rstrip().endswith(f"batches as an engine.\n{beginning}{said}")


def show(width: int, runs: list) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for table in results_tables(runs, CostOptions(), width=width):
        console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_every_policy_with_its_main_figures_fits(width: int) -> None:
    runs = make_runs()
    lines = show(width, runs)
    assert max(len(line) for line in lines) <= width
    assert "…" not in "".join(lines), "a cell was cut"
    for run in runs:
        first = run.policy if width >= 100 else run.policy.split("+")[0]
        rows = [line.split() for line in lines if line.strip().startswith(f"{first} ")]
        assert any(f"{run.energy_j / 1e3:.1f}" in row and f"{run.slo.attainment:.1%}"[:-1] in row for row in rows)


def test_the_saving_and_the_loss_are_signed() -> None:
    text = "\n".join(show(100, make_runs()))
    assert "−31.2" in text
    assert "+4.0" in text
    assert "1.45x" in text


def test_omitted_figures_are_named_and_a_wide_terminal_omits_none() -> None:
    narrow, wide = (" ".join(" ".join(show(width, make_runs())).split()) for width in (80, 200))
    assert "Left out for width: Energy while no request runs, kJ" in narrow
    assert "Left out for width" not in wide


def test_markup_in_a_name_is_only_text() -> None:
    assert "[red]x[/red]" in "\n".join(show(100, [make_run("[red]x[/red]")]))


def test_violated_slos_and_rejections_are_marked() -> None:
    marked = [
        cell.plain
        for table in results_tables(make_runs(), CostOptions(), width=200)
        for column in table.columns
        for cell in list(column.cells)
        if not isinstance(cell, str) and "red" in str(cell.style)
    ]
    assert {"+4.0", "91.2", "41"} <= set(marked)
