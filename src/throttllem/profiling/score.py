"""The score card of a performance model: errors on held-out rows, by engine size and over all sizes.

A random split of a dense profile proves little, so whole clocks, whole batch sizes and the fullest caches are held out
too. The scored trees are of the `QUICK` settings, new ones for each fold; those of a table have the full settings and
all rows, so their own error cannot be measured, and the scores are an estimate of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.table import Table

from throttllem.files import write_aside
from throttllem.profiling.train import FEWEST_ROWS, TrainSettings, measured_rows, repeated, settings_for, train

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

FOLDS = 4
CLOCK_BAND = 3
"""Clocks are held out in bands of this many neighbours: trees predict a single one from the clocks beside it."""
QUICK = TrainSettings(rounds=100, learning_rate=0.1)
"""Half the rounds at twice the rate take half the time, with nearly the same error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One split and engine size (`tp` None: all sizes), over the held-out rows.

    `r2` and `mae_ips` are of iterations per second, as in the paper; `mape_...` are mean absolute errors relative to
    the measurement (0.05 = 5 %), whose scatter they include.
    """

    split: str
    tp: int | None
    rows: int
    r2: float | None
    """None if all held-out rows took equally long."""
    mae_ips: float
    mape_seconds: float
    mape_watts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCard:
    """All scores of one profile, and the settings of the scored trees."""

    gpu: str
    model: str
    rows: int
    settings: TrainSettings
    scores: tuple[Score, ...]

    def score(self, split: str, tp: int | None = None) -> Score:
        """The score of one split and size. Raises KeyError if there is none."""
        for score in self.scores:
            if score.split == split and score.tp == tp:
                return score
        raise KeyError(f"no score of split {split!r} for tp {tp}")

    def to_json(self) -> dict[str, object]:
        """Plain values, in the fields' own names."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Seconds and watts of every row of a profile."""

    seconds: Floats
    watts: Floats


def score_profile(
    profile: pl.DataFrame,
    settings: TrainSettings | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> ScoreCard:
    """Train once per fold of every split and score the held-out rows. Same inputs, same card.

    A small profile has fewer splits, or none. Raises ValueError for one too small to train on.
    """
    if (rows := measured_rows(profile)) < FEWEST_ROWS:
        raise ValueError(f"a profile of {rows} rows: a score card takes at least {FEWEST_ROWS}")
    settings = settings or settings_for(profile, QUICK)
    splits = splits_of(profile, seed)
    total = sum(len(folds) for folds in splits.values())
    sizes = profile["tp"].to_numpy()
    scores: list[Score] = []
    done = 0
    for name, folds in splits.items():
        predicted = Pair(seconds=np.full(profile.height, np.nan), watts=np.full(profile.height, np.nan))
        for held_out in folds:
            trained = train(profile.filter(~held_out), settings)
            predicted.seconds[held_out], predicted.watts[held_out] = trained.predict(profile.filter(held_out))
            done += 1
            if on_progress:
                on_progress(done, total)
        scores.extend(_scores(name, np.logical_or.reduce(folds), profile, sizes, predicted))
    first = profile.row(0, named=True)
    return ScoreCard(
        gpu=first["gpu"], model=first["model"], rows=profile.height, settings=settings, scores=tuple(scores)
    )


def splits_of(profile: pl.DataFrame, seed: int) -> dict[str, list[Mask]]:
    """By name, the rows that each fold holds out. The folds of one split do not overlap.

    Rows that were measured together (`point`) are held out together: they are nearly copies of each other. A split that
    proves nothing is omitted: of a single batch size, of clocks that no seconds depend on, of too few rows to train on.
    """
    drawn = np.random.default_rng(seed).random(profile.height)
    if "point" in profile.columns:
        drawn = drawn[np.unique(profile["point"].to_numpy(), return_inverse=True)[1]]
    fullest = pl.col("kv_blocks") > 0.8 * pl.col("kv_blocks").max().over("tp")
    splits: dict[str, list[Mask]] = {
        "random 90/10": [drawn >= 0.9],
        "random 10/90": [drawn >= 0.1],
        "clocks left out": [] if repeated(profile) else list(_groups(profile["clock_mhz"], CLOCK_BAND)),
        "batch sizes left out": list(_groups(profile["batch"], 1)),
        "top fifth of KV left out": [profile.select(fullest).to_series().to_numpy()],
    }
    return {name: folds for name, folds in splits.items() if folds and all(_usable(profile, fold) for fold in folds)}


def write_score_card(card: ScoreCard, path: Path) -> None:
    """Write the card as JSON; the file appears whole or not at all."""
    with write_aside(path) as unfinished:
        unfinished.write_text(json.dumps(card.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def score_table(card: ScoreCard) -> Table:
    """The card for a terminal."""
    table = Table(title=f"{card.model} on {card.gpu}: {card.rows} rows")
    for name in ("held out", "tp", "rows", "R2", "MAE it/s", "MAPE seconds", "MAPE watts"):
        table.add_column(name, justify="left" if name == "held out" else "right")
    for score in card.scores:
        table.add_row(
            score.split if score.tp is None else "",
            "all" if score.tp is None else str(score.tp),
            f"{score.rows}",
            "-" if score.r2 is None else f"{score.r2:.4f}",
            f"{score.mae_ips:.2f}",
            f"{score.mape_seconds:.1%}",
            f"{score.mape_watts:.1%}",
            end_section=score.tp == card.scores[-1].tp,
        )
    return table


def _usable(profile: pl.DataFrame, held_out: Mask) -> bool:
    return bool(held_out.any()) and measured_rows(profile.filter(~held_out)) >= FEWEST_ROWS


def _groups(values: pl.Series, band: int) -> Iterator[Mask]:
    """Folds of whole values: bands of `band` neighbouring ones are dealt to the folds in turn."""
    distinct, index = np.unique(values.to_numpy(), return_inverse=True)
    fold = np.arange(distinct.size) // band % FOLDS
    for number in range(FOLDS):
        held_out = (fold == number)[index]
        # Too few values for this fold, or none left to train on.
        if held_out.any() and not held_out.all():
            yield held_out


def _scores(
    split: str, held_out: Mask, profile: pl.DataFrame, sizes: npt.NDArray[np.int64], predicted: Pair
) -> Iterator[Score]:
    measured = Pair(seconds=profile["seconds"].to_numpy(), watts=profile["watts"].to_numpy())
    yield _score(split, None, held_out, measured, predicted)
    for tp in np.unique(sizes[held_out]):
        yield _score(split, int(tp), held_out & (sizes == tp), measured, predicted)


def _score(split: str, tp: int | None, rows: Mask, measured: Pair, predicted: Pair) -> Score:
    rate, rate_hat = 1.0 / measured.seconds[rows], 1.0 / predicted.seconds[rows]
    spread = float(((rate - rate.mean()) ** 2).sum())
    return Score(
        split=split,
        tp=tp,
        rows=int(rows.sum()),
        r2=1.0 - float(((rate - rate_hat) ** 2).sum()) / spread if spread else None,
        mae_ips=float(np.abs(rate - rate_hat).mean()),
        mape_seconds=float(np.abs(predicted.seconds[rows] / measured.seconds[rows] - 1.0).mean()),
        mape_watts=float(np.abs(predicted.watts[rows] / measured.watts[rows] - 1.0).mean()),
    )
