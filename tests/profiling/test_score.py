from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from throttllem.profiling.score import ScoreCard, score_profile, score_table, splits_of, write_score_card

from .analytic import profile
from .conftest import SMALL

QUICKER = dataclasses.replace(SMALL, rounds=20, learning_rate=0.3, leaves=31)
SPLITS = ["random 90/10", "random 10/90", "clocks left out", "batch sizes left out", "top fifth of KV left out"]


@pytest.fixture(scope="module")
def card(measured: pl.DataFrame) -> ScoreCard:
    return score_profile(measured, QUICKER)


def test_every_split_by_size_and_over_all(card: ScoreCard) -> None:
    assert [(score.split, score.tp) for score in card.scores] == [(name, tp) for name in SPLITS for tp in (None, 1, 2)]
    for name in SPLITS:
        assert card.score(name).rows == card.score(name, 1).rows + card.score(name, 2).rows
    with pytest.raises(KeyError, match="tp 4"):
        card.score("random 90/10", 4)


def test_it_learns(card: ScoreCard) -> None:
    for name in SPLITS[:4]:
        score = card.score(name)
        assert score.r2 is not None
        assert score.r2 > 0.95
        assert score.mape_seconds < 0.12
        # Three clocks 75 MHz apart are missing at once: watts between them are told from 150 MHz away.
        assert score.mape_watts < (0.15 if name == "clocks left out" else 0.05)
    # Two per cent of noise: no model can be better than its mean of |N(0, 0.02)|, 1.6 %.
    assert min(score.mape_seconds for score in card.scores) > 0.014


def test_figures_by_hand(monkeypatch: pytest.MonkeyPatch, measured: pl.DataFrame) -> None:
    """A model that is always 10 % slow and draws 20 % too little."""

    class Slow:
        def predict(self, rows: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
            return rows["seconds"].to_numpy() * 1.1, rows["watts"].to_numpy() * 0.8

    monkeypatch.setattr("throttllem.profiling.score.train", lambda rows, settings: Slow())
    score = score_profile(measured).score("clocks left out", 2)
    rate = 1 / measured.filter(pl.col("tp") == 2)["seconds"].to_numpy()
    error = rate - rate / 1.1
    assert score.mape_seconds == pytest.approx(0.1)
    assert score.mape_watts == pytest.approx(0.2)
    assert score.mae_ips == pytest.approx(error.mean())
    assert score.r2 == pytest.approx(1 - (error**2).mean() / rate.var())


def test_folds_leave_out_whole_values(measured: pl.DataFrame) -> None:
    splits = splits_of(measured, 0)
    for name, column in (("clocks left out", "clock_mhz"), ("batch sizes left out", "batch")):
        values = measured[column].to_numpy()
        for held_out in splits[name]:
            assert not set(values[held_out]) & set(values[~held_out])
        assert (np.sum(splits[name], axis=0) == 1).all()
    clocks = np.unique(measured["clock_mhz"].to_numpy()[splits["clocks left out"][0]])
    assert clocks[:3].tolist() == [210, 285, 360]


def test_random_and_kv_splits(measured: pl.DataFrame) -> None:
    splits = splits_of(measured, 0)
    assert splits["random 90/10"][0].mean() == pytest.approx(0.1, abs=0.02)
    assert splits["random 10/90"][0].mean() == pytest.approx(0.9, abs=0.02)
    fullest = splits["top fifth of KV left out"][0]
    for tp in (1, 2):
        size = measured["tp"].to_numpy() == tp
        kv = measured["kv_blocks"].to_numpy()
        assert kv[size & fullest].min() > 240 * tp >= kv[size & ~fullest].max()


def test_a_split_that_cannot_be_made_is_left_out(measured: pl.DataFrame) -> None:
    one = measured.with_columns(batch=pl.lit(1, dtype=pl.Int64))
    assert "batch sizes left out" not in splits_of(one, 0)
    assert "clocks left out" in splits_of(one, 0)


def test_too_small_a_profile() -> None:
    with pytest.raises(ValueError, match="takes at least 100"):
        score_profile(profile(rows=90, sizes=(1,)))
    few = profile(rows=100, sizes=(1,))
    assert "random 90/10" not in {score.split for score in score_profile(few, QUICKER).scores}


def test_rows_measured_together_are_held_out_together(measured: pl.DataFrame) -> None:
    points = measured.with_columns(point=pl.int_range(pl.len()) // 20)
    (held_out,) = splits_of(points, 0)["random 90/10"]
    numbers = points["point"].to_numpy()
    assert 0 < held_out.sum() < len(numbers)
    assert not set(numbers[held_out]) & set(numbers[~held_out])


def test_seconds_that_stand_for_every_clock_say_nothing_of_clocks(measured: pl.DataFrame) -> None:
    assert "clocks left out" not in splits_of(measured.with_columns(any_clock=pl.lit(1)), 0)
    assert "clocks left out" in splits_of(measured.with_columns(any_clock=pl.lit(0)), 0)


def test_written_whole(tmp_path: Path, card: ScoreCard) -> None:
    path = tmp_path / "score.json"
    write_score_card(card, path)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["settings"]["rounds"] == QUICKER.rounds
    assert len(read["scores"]) == len(card.scores)
    assert read["scores"][0] == dataclasses.asdict(card.scores[0])
    assert [item.name for item in tmp_path.iterdir()] == ["score.json"]


def test_table_shows_every_score(card: ScoreCard) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(score_table(card))
    text = console.file.getvalue()
    assert all(name in text for name in SPLITS)
    assert f"{card.score('random 90/10').mape_seconds:.1%}" in text
