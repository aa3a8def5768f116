"""Warnings where another user than root could change what the keeper runs, or remove what it writes."""

from pathlib import Path

from throttllem.gpu.keeper_client import SOCKET
from throttllem.keeper.unit import STATE, folder_warnings, program_warnings, unit_text


def test_a_program_that_other_users_can_change(tmp_path: Path) -> None:
    assert list(program_warnings([Path("/usr/bin/env").resolve()])) == []
    program = tmp_path / "open/python"
    program.parent.mkdir(mode=0o777)
    program.parent.chmod(0o777)
    program.touch()
    warnings = list(program_warnings([program]))
    assert [line for line in warnings if line.startswith(f"{program.parent} can be changed by other users")]
    assert f"# !! {program.parent} can be changed by other users" in unit_text(["x"], SOCKET, STATE, warnings)


def test_folders_that_other_users_can_change(tmp_path: Path) -> None:
    assert list(folder_warnings(Path("/usr/lib/throttllem/run"), Path("/usr/lib"))) == []
    tmp_path.chmod(0o777)
    (warning,) = (line for line in folder_warnings(tmp_path / "not/yet/there") if line.startswith(f"{tmp_path} "))
    assert "remove journal and socket" in warning
