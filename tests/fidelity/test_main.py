from pathlib import Path

import pytest

from throttllem.physics.catalogue import Catalogue
from tools.fidelity import __main__ as fidelity

CATALOGUE = Catalogue.load()


def test_without_the_data_it_says_so_and_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fidelity, "DATA", tmp_path / "none")
    monkeypatch.setattr("sys.argv", ["fidelity"])
    assert fidelity.main() == 0
    assert "skipped: the reference data" in capsys.readouterr().out


def test_an_unknown_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "DATA", tmp_path)
    monkeypatch.setattr("sys.argv", ["fidelity", "--only", "idle,nonsense"])
    with pytest.raises(SystemExit):
        fidelity.main()


def test_a_constant_that_the_fit_does_not_give_is_named() -> None:
    law = CATALOGUE.gpu("h100-80gb-sxm").time
    fine = {"h100-80gb-sxm": {"time.host_s": law.host_s * 1.005, "time.gemm_norm": law.gemm_norm}}
    assert fidelity.shipped(fine, CATALOGUE).met
    off = fidelity.shipped({"h100-80gb-sxm": {"time.host_s": law.host_s * 1.02}}, CATALOGUE)
    assert not off.met
    assert off.found.startswith("h100-80gb-sxm time.host_s")


@pytest.mark.skipif(not fidelity.DATA.is_dir(), reason="the reference data (../shared/data) is not here")
def test_idle_watts_are_those_published() -> None:
    found = fidelity.run("idle", None)
    assert all(target.met for target in found.targets)
    assert [row.errors.count for row in found.rows] == [11, 9]
