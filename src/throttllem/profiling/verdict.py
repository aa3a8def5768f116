"""The verdict on a table: may clocks be set by it? Its rows are held against physics, its model against held-out rows.

Knows nothing of files, nor of the command line.
"""

# Four questions.
#
# Units. The physics of the named model on the named GPU is right within a factor of a few, whatever the engine. Medians
# that are off by a thousand or a million are milliseconds, microseconds, milliwatts or kilowatts.
#
# Physics. An iteration reads the weights that a token passes through and the KV cache of its sequences, and multiplies
# every token by those weights: no engine is faster than the memory's bandwidth and the peak of its GPUs. A GPU with a
# loaded model draws no less than when it is idle, and no more than its power limit. One row in a hundred may do so: a
# row is a measurement. An engine four times as slow as the physics of its model is another model, or another GPU, and
# so are watts far from those of the named GPU. Half of that is a doubt: engines have overheads and laws have errors.
#
# Clocks. Where physics expects low clocks to be slower, or to draw less, some of that must show, or the clock was not
# in force: a table of such rows would take the lowest clock for free.
#
# Model. Held-out rows are predicted with a small error. Clocks count only where many of them were measured: a table
# holds measured clocks alone, so with eight of them, of which three neighbours are held out at a time, the score says
# what trees make of a gap of 500 MHz, which no decision rests on.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl

from throttllem.core.forecast.performance_table import TableVerdict
from throttllem.physics.engine import EnginePhysics
from throttllem.physics.model import Weights
from throttllem.profiling.profile import tokens_per_step_of
from throttllem.profiling.score import CLOCK_BAND, FOLDS, Score, ScoreCard

MOST_ERROR = 0.15
"""Mean relative error of held-out seconds and of watts."""
LEAST_R2 = 0.85
"""Of held-out iterations per second. An honest live profile of 60 points has 0.95 with whole batch sizes held out."""
MANY_CLOCKS = 2 * CLOCK_BAND * FOLDS
"""With fewer, a band of clocks that is held out leaves a gap which the table itself does not have."""
_TOLERATED_ROWS = 0.01
_SCATTER = 0.9
"""A row may beat physics by this factor: its own scatter."""
_SLOW, _SLOW_DOUBT = 4.0, 2.0
"""Medians over physics. Another model of up to twice the size cannot be told from an engine's overhead."""
_FAR_WATTS, _WATTS_DOUBT = 1.8, 1.4
"""Medians of watts over physics, or physics over them; laws of GPUs that were not measured err by up to a third."""
_OVER_LIMIT = 1.1
"""Watts above a power limit that a GPU draws for moments."""
_UNDER_IDLE = 0.5
"""Idle watts differ between boards, and a user's GPU may idle lower than the catalogue's."""
_VISIBLE, _FOLLOWED = 0.1, 0.2
"""Where physics expects a change by more than the first, at least this share of it must be there."""
_MANY_ROWS, _STILL = 50, 0.005
"""Among this many rows watts scatter by more than this share."""
_ROWS = 3000
"""Rows that are held against physics; of a larger profile every n-th."""
_UNIT_FACTOR = 100.0
"""Medians that are further from physics than this are in another unit."""
_SPECULATES = 1.05
"""Tokens a step from which an engine counts as one that speculates."""
_SECONDS = ((1e6, "microseconds"), (1e3, "milliseconds"))
_WATTS = ((1e6, "microwatts"), (1e3, "milliwatts"), (1e-3, "kilowatts"))

Floats = npt.NDArray[np.float64]


def judge(profile: pl.DataFrame, card: ScoreCard | None, physics: EnginePhysics, *, accept: bool) -> TableVerdict:
    """The verdict on the table of one engine size. `card` None: no scores were made of the profile."""
    rows = profile.filter(pl.col("tp") == physics.tp)
    judged = [] if card is None else list(_judged(card, physics.tp, rows["clock_mhz"].n_unique()))
    faults = (*_of_rows(rows, physics), *_of_scores(judged))
    return TableVerdict(
        faults=faults,
        doubts=() if faults else tuple(_doubts(rows, physics)),
        accepted=accept and bool(faults),
        seconds_error=max((score.mape_seconds for score in judged), default=None),
        watts_error=max((score.mape_watts for score in judged), default=None),
        tokens_per_step=tokens_per_step_of(rows),
    )


def judge_law(
    profile: pl.DataFrame, errors: tuple[float, float], physics: EnginePhysics, *, accept: bool
) -> TableVerdict:
    """The verdict on the table of a calibrated law; `errors`: mean relative ones of held-out seconds and watts."""
    faults = list(_of_rows(profile, physics))
    for what, error in zip(("seconds", "watts"), errors, strict=True):
        if error > MOST_ERROR:
            of = "with clocks or batch sizes left out"
            faults.append(f"{of}, {what} of the law are {error:.0%} off on average (at most {MOST_ERROR:.0%})")
    return TableVerdict(
        faults=tuple(faults),
        doubts=() if faults else tuple(_doubts(profile, physics)),
        accepted=accept and bool(faults),
        seconds_error=errors[0],
        watts_error=errors[1],
        tokens_per_step=tokens_per_step_of(profile),
    )


def _judged(card: ScoreCard, tp: int, clocks: int) -> Iterator[Score]:
    splits = ["random 90/10", "batch sizes left out", *(["clocks left out"] if clocks >= MANY_CLOCKS else [])]
    return (score for score in card.scores if score.tp == tp and score.split in splits)


def _of_scores(judged: list[Score]) -> Iterator[str]:
    """The faults of the model on held-out rows."""
    if not judged:
        yield "no rows could be held out, so the table's errors are unknown: profile for longer, at more batch sizes"
    for score in judged:
        of = f"with {score.split}" if score.split.endswith("left out") else "with a random tenth of the points left out"
        if score.mape_seconds > MOST_ERROR:
            yield f"{of}, seconds are {score.mape_seconds:.0%} off on average (at most {MOST_ERROR:.0%})"
        elif score.r2 is not None and score.r2 < LEAST_R2:
            yield f"{of}, iterations per second have an R2 of {score.r2:.2f} (at least {LEAST_R2})"
        if score.mape_watts > MOST_ERROR:
            yield f"{of}, watts are {score.mape_watts:.0%} off on average (at most {MOST_ERROR:.0%})"


def _of_rows(rows: pl.DataFrame, physics: EnginePhysics) -> Iterator[str]:
    """The faults of the measurements."""
    rows = rows.gather_every(max(1, rows.height // _ROWS))
    law_s, law_w, least_s = _physics(rows, physics)
    seconds, watts = rows["seconds"].to_numpy(), rows["watts"].to_numpy()
    yield from _of_clocks(rows, physics)
    at = f"{physics.model.name} on {physics.tp} x {physics.gpu.name}"
    if unit := _unit(seconds / law_s, _SECONDS):
        yield f"column seconds looks like {unit[1]} (median {np.median(seconds):.3g}): divide it by {unit[0]:g}"
    else:
        yield from _of_seconds(seconds, law_s, least_s, at)
    if unit := _unit(watts / law_w, _WATTS):
        fix = f"divide it by {unit[0]:g}" if unit[0] > 1 else f"multiply it by {1 / unit[0]:g}"
        yield f"column watts looks like {unit[1]} (median {np.median(watts):.3g}): {fix}"
    elif _of_one_gpu(float(np.median(watts / law_w)), physics.tp):
        yield f"column watts looks like the watts of one of {physics.tp} GPUs: give those of all of them together"
    else:
        faults = list(_of_watts(watts, physics))
        ratio = float(np.median(watts / law_w))
        if not faults and not 1 / _FAR_WATTS < ratio < _FAR_WATTS:
            faults = [
                f"watts are {ratio:.2f} times those of {at} by physics: give the watts of its GPUs, and the right --gpu"
            ]
        yield from faults


def _doubts(rows: pl.DataFrame, physics: EnginePhysics) -> Iterator[str]:
    """What is odd and may be right."""
    rows = rows.gather_every(max(1, rows.height // _ROWS))
    law_s, law_w, _ = _physics(rows, physics)
    at = f"{physics.model.name} on {physics.tp} x {physics.gpu.name}"
    ratio = float(np.median(rows["seconds"].to_numpy() / law_s))
    if ratio > _SLOW_DOUBT:
        yield f"iterations take {ratio:.1f} times as long as {at} would need: a slow engine, or another --model, --gpu"
    if (rate := tokens_per_step_of(rows)) is not None and rate > _SPECULATES:
        yield f"the engine speculated in the profile ({rate:.1f} tokens a step): the table is of steps with its drafts"
    ratio = float(np.median(rows["watts"].to_numpy() / law_w))
    if not 1 / _WATTS_DOUBT < ratio < _WATTS_DOUBT:
        yield f"watts are {ratio:.2f} times those of {at} by physics: check the reading, and --gpu"


def _unit(ratios: Floats, units: tuple[tuple[float, str], ...]) -> tuple[float, str] | None:
    """The unit that the values are in, if it is not SI: the one that brings their median nearest to physics."""
    median = float(np.median(ratios))
    if 1 / _UNIT_FACTOR < median < _UNIT_FACTOR:
        return None
    unit = min(units, key=lambda unit: abs(np.log(median / unit[0])))
    return unit if 1 / _UNIT_FACTOR < median / unit[0] < _UNIT_FACTOR else None


def _of_one_gpu(ratio: float, tp: int) -> bool:
    """Whether watts are so far below those of all GPUs, and so near those of one, that one was read."""
    return tp > 1 and ratio < 0.65 and 0.65 < ratio * tp < 1.5


def _of_clocks(rows: pl.DataFrame, physics: EnginePhysics) -> Iterator[str]:
    """Clocks that the GPU does not have, and clocks that were not in force: at low ones, iterations take as long, or
    draw as much, as at high ones, though physics says otherwise.
    """
    gpu, clocks = physics.gpu, rows["clock_mhz"].to_numpy()
    low, high = int(clocks.min()), int(clocks.max())
    if low < gpu.clock_min_mhz or high > gpu.clock_max_mhz:
        has = f"{gpu.name} has {gpu.clock_min_mhz} to {gpu.clock_max_mhz} MHz"
        yield f"column clock_mhz holds {low} to {high}, and {has}: give MHz, and the right --gpu"
        return
    if low < high < gpu.clock_max_mhz:
        yield (
            f"the highest clock of the profile is {high} MHz, and {gpu.name} goes up to {gpu.clock_max_mhz}: profile "
            "again with the maximum clock, which the gateway uses where it has no prediction"
        )
    if low == high or ("any_clock" in rows.columns and bool((rows["any_clock"] == 1).any())):
        return
    slow, fast = clocks <= np.quantile(clocks, 0.25), clocks >= np.quantile(clocks, 0.75)
    top_s, top_w, _ = _physics(rows.with_columns(clock_mhz=pl.lit(gpu.clock_max_mhz)), physics)
    law_s, law_w, _ = _physics(rows, physics)
    for name, top, law, changes in (("seconds", top_s, law_s, "rise"), ("watts", top_w, law_w, "fall")):
        # Each row over what its load would take at the maximum clock, so that only the clock is left.
        measured, expected = (
            float(np.median((values / top)[slow]) / np.median((values / top)[fast]))
            for values in (rows[name].to_numpy(), law)
        )
        if abs(expected - 1.0) > _VISIBLE and (measured - 1.0) / (expected - 1.0) < _FOLLOWED:
            yield (
                f"{name} do not {changes} at low clocks: {measured:.2f} times those at high clocks, by physics "
                f"{expected:.2f} times; was the clock in force, and measured on these GPUs?"
            )


def _of_seconds(seconds: Floats, law_s: Floats, least_s: Floats, at: str) -> Iterator[str]:
    fast = seconds < least_s * _SCATTER
    if fast.mean() > _TOLERATED_ROWS:
        worst = int(np.argmin(seconds / least_s))
        yield (
            f"{fast.mean():.0%} of the rows are faster than memory bandwidth and peak of {at} allow (one takes "
            f"{seconds[worst] * 1e3:.3g} ms, at least {least_s[worst] * 1e3:.3g} ms are needed): the profile is of "
            "another model or GPU, give --model and --gpu"
        )
    ratio = float(np.median(seconds / law_s))
    if ratio > _SLOW:
        yield (
            f"iterations take {ratio:.0f} times as long as {at} would need: the profile is of another model or GPU, or "
            "other work ran beside it"
        )


def _of_watts(watts: Floats, physics: EnginePhysics) -> Iterator[str]:
    if watts.size >= _MANY_ROWS and np.std(watts) < _STILL * np.mean(watts):
        yield f"watts never change ({np.median(watts):.0f} W in all rows): the reading or the counter stands still"
        return
    limit_w, idle_w = physics.gpu.power.limit_w * physics.tp, physics.idle_w()
    for outside, text in (
        (watts > limit_w * _OVER_LIMIT, f"above the power limit of {physics.tp} x {physics.gpu.name}, {limit_w:.0f} W"),
        (
            watts < idle_w * _UNDER_IDLE,
            f"below half of what {physics.tp} x {physics.gpu.name} draw idle, {idle_w:.0f} W",
        ),
    ):
        if outside.mean() > _TOLERATED_ROWS:
            yield (
                f"watts are {text}, in {outside.mean():.0%} of the rows (median {np.median(watts):.0f} W): give the "
                "watts of all GPUs of the engine together"
            )


def _physics(rows: pl.DataFrame, physics: EnginePhysics) -> tuple[Floats, Floats, Floats]:
    """Seconds and watts of each row by the law of its engine, and the least seconds that its GPUs could need."""
    gpu, model = physics.gpu, physics.model
    weight_bytes = model.weight_bytes * model.active_parameters / model.parameters
    quantised = model.weights is not Weights.BF16 or model.expert_weights is not Weights.BF16
    # Products of narrower numbers may run at twice the peak, on GPUs that can.
    peak, bandwidth = gpu.peak_flop_per_s * physics.tp * (2 if quantised else 1), gpu.bandwidth_bytes_per_s * physics.tp
    layer_parameters = model.active_parameters - model.vocabulary * model.hidden
    kv_bytes = 0.0 if model.window else model.kv_bytes_per_token
    found = []
    for row in rows.iter_rows(named=True):
        prefill = row["prefill_tokens"]
        prompts = row.get("prompts", 1 if prefill else 0)
        decode = max(0, row["batch"] - prompts)
        blocks = row["kv_blocks"] - -(-prefill // row["block_tokens"])
        # About half of each sequence's last block is filled.
        kv_tokens = max(decode, blocks * row["block_tokens"] - decode * row["block_tokens"] // 2) if decode else 0
        pairs = row.get("prefill_pairs", prefill * prefill / (2 * max(1, prompts)))
        clock = min(max(row["clock_mhz"], gpu.clock_min_mhz), gpu.clock_max_mhz)
        read_s = (weight_bytes + kv_bytes * (kv_tokens - decode * row["block_tokens"] // 2)) / bandwidth
        products_s = 2 * layer_parameters * (decode + prefill) / peak
        found.append((*physics.iteration(clock, decode, kv_tokens, prefill, pairs), max(read_s, products_s)))
    law = np.array(found, dtype=np.float64)
    return law[:, 0], law[:, 1], law[:, 2]
