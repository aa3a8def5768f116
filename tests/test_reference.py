"""The reference pages are those of the code, and leave nothing out."""

import pytest

from throttllem.config import RESOLVED, Options
from throttllem.option_sources import leaves
from tools.reference import FOLDER, pages


@pytest.mark.parametrize(("name", "text"), pages().items())
def test_the_committed_page_is_current(name, text):
    assert (FOLDER / name).read_text(encoding="utf-8") == text, "run `python -m tools.reference`"


def test_every_option_is_on_its_page_with_a_meaning():
    rows = [line.split(" | ") for line in pages()["configuration.md"].splitlines() if line.startswith("| `")]
    meanings = {row[0].strip("| `"): row[4] for row in rows}
    for path, _ in leaves(Options()):
        if path not in RESOLVED:
            assert meanings[path.replace("engines.0", "engines.N")].endswith("."), path


def test_every_metric_of_a_scrape_is_on_its_page():
    page = pages()["metrics.md"]
    for name in ("throttllem_energy_joules_total", "throttllem_build_info", "gen_ai_client_token_usage"):
        assert f"| `{name}` |" in page
    assert "| `gen_ai_client_token_usage` | histogram |  | `gen_ai_operation_name`, " in page
