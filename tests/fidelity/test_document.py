from pathlib import Path

from matplotlib.figure import Figure

from throttllem.calibrate.errors import Errors
from tools.fidelity.document import draw, markdown
from tools.fidelity.section import ErrorRow, Plot, Section, Target


def line(figure: Figure) -> None:
    figure.subplots().plot([0, 1], [1, 0])


SECTION = Section(
    title="A part",
    text="Compared.",
    rows=(ErrorRow(what="watts", held_out="each clock", errors=Errors.of([0.01, -0.03])),),
    targets=(
        Target(what="watts", limit="7 %", found="2.0 %", met=True),
        Target(what="seconds", limit="1 %", found="2 %", met=False),
    ),
    plots=(Plot(name="part", caption="A line.", draw=line),),
)


def test_tables_and_pictures() -> None:
    text = markdown([SECTION], "pictures")
    assert "| watts | each clock | 2 | 2.0% | 2.0% | 2.8% | 3.0% |" in text
    assert "| watts | 7 % | 2.0 % | met |" in text
    assert "| seconds | 1 % | 2 % | **not met** |" in text
    assert "![A line.](pictures/part.png)" in text


def test_the_same_figures_draw_the_same_file(tmp_path: Path) -> None:
    draw(SECTION, tmp_path)
    first = (tmp_path / "part.png").read_bytes()
    draw(SECTION, tmp_path)
    assert (tmp_path / "part.png").read_bytes() == first
    assert first.startswith(b"\x89PNG")
