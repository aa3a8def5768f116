"""`throttllem arena`: errors that name a remedy, and a whole run of one cell."""

import json

import pytest
from command import run


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("THROTTLLEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("THROTTLLEM_WORKERS", "1")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--grid", "judgin"], ["--grid judgin", "did you mean judging?"]),
        (["--cells", "40%"], ["--cells 40%", "no cell of the tuning grid matches"]),
        (["--policies", "green-lm"], ["--policies green-lm", "did you mean green-llm?"]),
        (["--policies", ","], ["name one or more"]),
        (["--policies", "no_such_module:Mine"], ["there is no module no_such_module"]),
        (["--trace", "nowhere.csv", "--policies", "throttllem"], ["nowhere.csv", "no such file"]),
    ],
)
def test_errors_name_a_remedy(monkeypatch, capsys, words, expected):
    assert run(monkeypatch, "arena", *words) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in expected), error


@pytest.mark.slow
def test_a_cell_is_judged_and_its_runs_are_kept(monkeypatch, capsys, tmp_path):
    words = [
        *("arena", "--cells", "code", "--policies", "least-energy,static,power-cap", "--seeds", "1"),
        *("--json", "arena.json", "--document", "arena.md"),
    ]
    assert run(monkeypatch, *words) == 0
    assert "least-energy" in capsys.readouterr().out
    first = json.loads((tmp_path / "arena.json").read_text())
    (entry,) = first["entries"]
    assert set(entry["rows"]) == {"triton", "least-energy", "static", "power-cap", "power-cap-beforehand"}
    assert len(entry["tried"]["power-cap"]) == 3
    assert entry["rows"]["static"]["energy_j"] == min(
        tried["energy_j"]
        for tried in entry["tried"]["static"]
        if tried["attainment"] >= entry["rows"]["triton"]["attainment"] - 0.005
    )
    assert (tmp_path / "arena.svg").exists()
    assert (tmp_path / "out/arena/arena.html").exists()
    assert run(monkeypatch, *words) == 0
    again = json.loads((tmp_path / "arena.json").read_text())
    assert without_cpu(again) == without_cpu(first)


def without_cpu(value):
    """The same without seconds of CPU, which static clocks, that are run each time, take anew."""
    if isinstance(value, dict):
        return {key: without_cpu(item) for key, item in value.items() if key != "cpu_s"}
    return [without_cpu(item) for item in value] if isinstance(value, list) else value
