"""The page opens offline, and escapes what policies are called."""

from arena.made import CELLS, entry, outcome

from throttllem.arena.cells import Grid
from throttllem.arena.results.page import write_page

GRID = Grid(name="judging", cells=CELLS, first_seed=1001)


def test_it_shows_every_cell_and_contender(tmp_path):
    tried = {"static": (outcome(60.0), outcome(90.0))}
    entries = [entry(cell, least_energy=60.0, static=60.0, sched=55.0, tried=tried) for cell in CELLS]
    text = write_page(tmp_path, entries, GRID, "abc").read_text()
    assert all(cell.name.replace("/", "\\u002f") in text for cell in CELLS)
    assert all(f'id="plot-{key}"' in text for key in ("savings", "shares", "pareto"))
    assert "least energy of all" in text
    assert "src=" not in text.split("<script>")[0]


def test_without_a_reference_there_is_no_share(tmp_path):
    text = write_page(tmp_path, [entry(CELLS[0], least_energy=60.0)], GRID, "abc").read_text()
    assert 'id="plot-shares"' not in text


def test_names_cannot_end_the_script(tmp_path):
    entries = [entry(CELLS[0], **{"</script><b>": 60.0})]
    text = write_page(tmp_path, entries, GRID, "abc").read_text()
    assert "</script><b>" not in text
