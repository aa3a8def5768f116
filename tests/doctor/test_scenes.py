"""The reports of the doctor in docs/keeper.md are those that it prints."""

from pathlib import Path

import pytest

from tests.doctor.scenes import NAMES, masked, scene

PAGE = Path(__file__).parents[2] / "docs/keeper.md"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_what_it_prints(name, ward, processes, library):
    code, output = scene(name, ward, processes, library)
    shown = PAGE.read_text().split(f"<!-- {name} -->\n```text\n", 1)[1].split("```", 1)[0]
    assert code == 1
    assert masked(output) == masked(shown)
