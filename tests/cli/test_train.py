"""`throttllem train`: the verdict in words, in the exit code and in the table's file."""

from functools import partial

import polars as pl
import pytest
from command import run
from profiling.test_verdict import FLEET, score

from throttllem.profiling.measure import ProfilePlan
from throttllem.profiling.profile import write_profile
from throttllem.profiling.score import ScoreCard
from throttllem.profiling.storage import load_table
from throttllem.profiling.tables import profile_fleet
from throttllem.profiling.train import TrainSettings, train


@pytest.mark.parametrize(
    ("watts_in", "more", "code", "words"),
    [
        (1, [], 0, "verdict, tp 4: sound"),
        (1000, [], 1, "verdict, tp 4: `serve --clocks on` refuses this table"),
        (1000, ["--accept"], 0, "verdict, tp 4: accepted with --accept"),
    ],
)
def test_the_verdict_travels_with_the_table(tmp_path, monkeypatch, capsys, watts_in, more, code, words):
    card = ScoreCard(gpu="", model="", rows=120, settings=TrainSettings(), scores=(score(),))
    monkeypatch.setattr("throttllem.profiling.score.score_profile", lambda frame, on_progress: card)
    quickly = partial(train, settings=TrainSettings(rounds=5))
    monkeypatch.setattr("throttllem.profiling.train.train", quickly)
    monkeypatch.chdir(tmp_path)
    frame = profile_fleet(FLEET, ProfilePlan(rows=120)).with_columns(pl.col("watts") * watts_in)
    write_profile(frame, tmp_path / "p.csv")
    assert run(monkeypatch, "train", "p.csv", "--out", "t", *more) == code
    said = capsys.readouterr().out
    assert words in said
    assert ("looks like milliwatts" in said) == (watts_in == 1000)
    assert sorted(file.name for file in (tmp_path / "t").iterdir()) == ["score_card.json", "table-tp4.npz"]
    found = load_table(tmp_path / "t/table-tp4.npz").verdict
    assert found is not None
    assert (found.sound, bool(found.faults)) == (code == 0, watts_in == 1000)
