"""The tables and the picture say what was found, and which figures miss SLOs."""

import json
import xml.etree.ElementTree as ET

from arena.made import CELLS, entry, outcome

from throttllem.arena.cells import JUDGING, TUNING, Grid
from throttllem.arena.contenders import RIVALS, Field
from throttllem.arena.results.document import best_beforehand, markdown, picture, results_json, terminal

GRID = Grid(name="judging", cells=CELLS, first_seed=1001)
ENTRIES = [
    entry(cell, seed, least_energy=60.0, static=62.0, agft=(55.0, 0.9), sched=58.0)
    for cell in CELLS
    for seed in (1001, 1002)
]


def page():
    return markdown(ENTRIES, GRID, command="make arena", tree="abc", picture="arena.svg")


def test_the_page_names_its_basis():
    text = page()
    assert "Written by `make arena`: 3 cells of the judging grid, seeds 1001 to 1002, sources `abc`." in text
    assert "**simulated**" in text
    assert "(arena.svg)" in text


def test_groups_and_cells_have_their_savings():
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| ")]
    of = {row[0].strip("|* `"): row for row in reversed(rows)}
    assert of["least-energy"][1] == "−40.0"
    assert of["least-energy"][-1] == "95 |"
    assert "| **`agft`** | −45.0" in page()
    cell = of[CELLS[0].name]
    assert cell[3:6] == ["40.0", "38.0", "42.0"]
    assert cell[6:] == ["0.0 `triton`", "`least-energy`", "60.0 |"]


def test_targets_are_marked():
    text = page()
    assert "| 95.2 % | met |" in text
    assert "| not run |" in text


def test_the_picture_is_well_formed_and_marks_what_misses_slos():
    text = picture(ENTRIES)
    ET.fromstring(text)
    assert "45.0 %, 3 cells miss SLOs" in text
    assert "40.0 %<" in text


def test_the_terminal_has_means_and_targets():
    lines = terminal(ENTRIES, GRID)
    assert any("agft" in line and "3 cells more than 0.5 below" in line for line in lines)
    assert any(line.startswith("met: attainment never more than 0.5 point") for line in lines)
    assert not any("beforehand" in line for line in lines)


def test_tuning_names_the_values_to_set_beforehand():
    rival = RIVALS[0]
    energies = [(90.0, 1.0), (50.0, 0.9), (60.0, 0.996)]
    tried = {rival.name: tuple(outcome(joules, met) for joules, met in energies)}
    found = [entry(TUNING.cells[0], 1, tried=tried)]
    ((name, value, saved, short),) = best_beforehand(found)
    assert (name, value, round(saved, 6), round(short, 6)) == (rival.name, rival.values[2], 0.4, 0.004)
    assert any(line.startswith(f"beforehand, {rival.name}: {value:g}") for line in terminal(found, TUNING))
    hopeless = {rival.name: tuple(outcome(50.0, met) for met in (0.9, 0.8, 0.95))}
    assert best_beforehand([entry(TUNING.cells[0], 1, tried=hopeless)])[0][1] == rival.values[2]


def test_json_holds_every_figure():
    found = json.loads(json.dumps(results_json(ENTRIES, Field(names=("triton", "least-energy")), "abc")))
    assert found["basis"] == "simulated"
    assert len(found["entries"]) == 6
    assert found["entries"][0]["rows"]["least-energy"]["energy_j"] == 60.0
    assert JUDGING.cells[0].name == found["entries"][0]["cell"]
