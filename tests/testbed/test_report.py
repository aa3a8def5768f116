"""What stands between the marks of a document, and nothing else, is replaced."""

from pathlib import Path

import pytest

from tools.testbed.report import replace_between

MARKS = "<!-- here -->", "<!-- /here -->"


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    replace_between(document, *MARKS, "new\n")
    replace_between(document, *MARKS, "newer\n")
    assert document.read_text() == f"before\n{MARKS[0]}\n\nnewer\n\n{MARKS[1]}\nafter\n"


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("nothing here\n")
    with pytest.raises(ValueError, match="marks"):
        replace_between(document, *MARKS, "new\n")
    assert document.read_text() == "nothing here\n"
