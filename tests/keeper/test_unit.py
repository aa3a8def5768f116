"""Warnings where another user than root could change what the keeper runs."""

from pathlib import Path

import pytest

from throttllem.gpu.keeper_client import SOCKET
from throttllem.keeper.unit import STATE, program_warnings, unit_text


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_program_that_other_users_can_change(tmp_path: Path, mode: int) -> None:
    assert list(program_warnings([Path("/usr/bin/env").resolve()])) == []
    program = tmp_path / "open/python"
    program.parent.mkdir()
    program.parent.chmod(mode)
    program.touch()
    warnings = list(program_warnings([program]))
    assert [line for line in warnings if line.startswith(f"{program.parent} can be changed by other users")]
    assert f"# !! {program.parent} can be changed by other users" in unit_text(["x"], SOCKET, STATE, warnings)
