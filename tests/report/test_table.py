from __future__ import annotations

import io

import pytest
from rich.console import Console

from throttllem.report.table import results_table

from .factory import make_run, make_runs


def show(width: int, runs: list) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(results_table(runs, width=width))
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


def test_what_is_left_out_is_named_and_a_wide_terminal_leaves_out_nothing() -> None:
    narrow, wide = (" ".join(" ".join(show(width, make_runs())).split()) for width in (80, 200))
    assert "No room for: idle kJ" in narrow
    assert "No room for" not in wide


def test_markup_in_a_name_is_only_text() -> None:
    assert "[red]x[/red]" in "\n".join(show(100, [make_run("[red]x[/red]")]))


def test_broken_promises_and_rejections_stand_out() -> None:
    table = results_table(make_runs(), width=200)
    marked = [
        cell.plain
        for column in table.columns
        for cell in list(column.cells)
        if not isinstance(cell, str) and "red" in str(cell.style)
    ]
    assert {"+4.0", "91.2", "41"} <= set(marked)
