"""What somebody else than root could change of a keeper is said: what it runs, and where it writes."""

from pathlib import Path

from throttllem.gpu.keeper_client import SOCKET
from throttllem.keeper.unit import STATE, loose, not_roots, unit_text


def test_what_is_not_roots_alone_is_said(tmp_path: Path) -> None:
    assert list(not_roots([Path("/usr/bin/env").resolve()])) == []
    program = tmp_path / "open/python"
    program.parent.mkdir(mode=0o777)
    program.parent.chmod(0o777)
    program.touch()
    said = list(not_roots([program]))
    assert [line for line in said if line.startswith(f"{program.parent} is not root's alone")]
    warned = unit_text(["x"], SOCKET, STATE, said)
    assert f"# !! {program.parent} is not root's alone" in warned


def test_folders_that_are_not_roots_alone_are_said(tmp_path: Path) -> None:
    assert list(loose(Path("/usr/lib/throttllem/run"), Path("/usr/lib"))) == []
    tmp_path.chmod(0o777)
    (said,) = (line for line in loose(tmp_path / "not/yet/there") if line.startswith(f"{tmp_path} "))
    assert "can take journal and socket away" in said
