"""Profiling a live engine: the measured iterations follow its law, however they are timed and interrupted."""

import asyncio
import contextlib
import dataclasses
import json

import polars as pl
import pytest
from engines.live import asked

from throttllem.core.forecast.switch_latency import FEWEST, ProfiledSwitches
from throttllem.engines.base import EngineError, Report
from throttllem.gpu.device import Switch, Work
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.physics.catalogue import Catalogue
from throttllem.profiling.live.plan import LivePlan, quick_plan
from throttllem.profiling.live.profiler import Device, LiveProfiler, _without_decode
from throttllem.profiling.live.run import (
    CheckpointError,
    LiveProfileError,
    checkpoint_of,
    chosen_clocks,
    profile_live,
    quick_clocks,
)
from throttllem.profiling.profile import is_quick, read_profile, switches_of
from throttllem.profiling.score import score_profile
from throttllem.profiling.train import settings_for

from .testbed import CLOCKS, SMALL, Law, Silent, engine_and_gpu, modelled, virtually

PLAN = LivePlan(points=7, steps=3, bursts=3)


def profiled(out, *, plan=PLAN, engine=None, device=None, resume=False, said=None):
    """The frame of a profile in virtual time."""

    async def run():
        inner, gpu = engine_and_gpu()
        some = (engine or (lambda plain: plain))(inner)
        lines = said if said is not None else []
        return await profile_live(some, device or modelled(gpu), plan, out, resume=resume, say=lines.append)

    rows = virtually(run())
    frame = read_profile(out)
    assert frame.height == rows
    return frame


def test_a_profile_too_short_for_scores_says_so(tmp_path):
    said = []
    frame = profiled(tmp_path / "p.csv", said=said, plan=LivePlan(points=8))
    assert score_profile(frame).scores == ()
    assert [line for line in said if "too few for `train` to hold any out" in line]


def predicted(row):
    """Seconds by the law, and how far the unknown tokens of a row's last blocks may move them."""
    decode = row["batch"] - row["prompts"]
    blocks = row["kv_blocks"] - row["prompts"] * -(-row["prefill_tokens"] // 16 // max(1, row["prompts"]))
    tokens = blocks * 16 - decode * 7.5
    return Law().iteration(1400, decode, max(0, tokens), row["prefill_tokens"], 0)[0], 1e-7 * (16 * row["batch"] + 32)


def worst(frame):
    """The largest relative error beyond what rows leave open."""
    errors = []
    for row in frame.iter_rows(named=True):
        seconds, open_s = predicted(row)
        errors.append(max(0.0, abs(row["seconds"] - seconds) - open_s) / seconds)
    return max(errors)


# ---- what is measured ----------------------------------------------------------------------------------------


def test_an_engine_that_reports_its_steps_is_measured_exactly(tmp_path):
    said = []
    frame = profiled(tmp_path / "p.csv", said=said)
    assert worst(frame) < 1e-6
    assert set(frame["seconds_by"]) == {"steps"}
    assert any("own steps" in line for line in said)
    assert {row for row in frame["clock_mhz"]} == set(CLOCKS)
    assert frame["batch"].max() == 8
    assert frame["prefill_tokens"].max() == 512
    assert frame.filter(pl.col("prompts") > 0).height > 20
    assert frame["kv_blocks"].max() > 300
    assert not checkpoint_of(tmp_path / "p.csv").exists()


def test_an_engine_without_reports_is_measured_by_its_streams(tmp_path):
    said = []
    frame = profiled(tmp_path / "p.parquet", engine=Silent, said=said)
    assert worst(frame) < 0.02
    assert set(frame["seconds_by"]) == {"streams"}
    assert any("requests of other clients go unnoticed" in line for line in said)
    prompts = frame.filter(pl.col("prompts") > 0)
    assert prompts.height > 15
    assert prompts.filter(pl.col("batch") == 1).height >= 4 * len(CLOCKS)


@pytest.mark.parametrize("reports", [True, False], ids=["steps", "streams"])
def test_a_batch_is_held_however_slowly_its_requests_begin(tmp_path, reports):
    """The last of eight begins when the first has its planned output."""

    class Slow(Silent):
        @contextlib.asynccontextmanager
        async def open(self, call):
            self.open_now += 1
            try:
                await asyncio.sleep(0.5 * (self.open_now - 1))
                async with self.engine.open(call) as reply:
                    yield reply
            finally:
                self.open_now -= 1

        async def watch(self, tell):
            await (self.engine.watch(tell) if reports else super().watch(tell))

    frame = profiled(tmp_path / "p.csv", engine=Slow)
    rows = frame.filter((pl.col("batch") == SMALL["max_batch"]) & (pl.col("prompts") == 0))
    # Where the cache is full of contexts, there is no room for longer outputs.
    assert (rows["kv_blocks"] < SMALL["kv_blocks"] / 2).sum() >= PLAN.steps * len(CLOCKS)


def test_a_modelled_gpu_is_named_and_has_every_clock(tmp_path):
    said = []
    frame = profiled(tmp_path / "p.csv", said=said)
    assert any(line.startswith("watts modelled") for line in said)
    assert set(frame["watts_by"]) == {"modelled"}
    assert set(frame["any_clock"]) == {1}
    for clock in CLOCKS:
        rows = frame.filter(pl.col("clock_mhz") == clock)
        assert rows["seconds"].to_list() == frame.filter(pl.col("clock_mhz") == 1400)["seconds"].to_list()
        decode = rows["batch"] - rows["prompts"]
        assert rows["watts"].to_list() == pytest.approx((clock / 10 + decode).to_list())


class Drawing(Silent):
    """The engine's joules go to the GPU, which is what a real one measures."""

    def __init__(self, engine, gpu):
        super().__init__(engine)
        self.gpu = gpu

    async def watch(self, tell):
        def both(report):
            work = Work(
                seconds=report.seconds,
                decode_sequences=0,
                kv_tokens=0,
                prefill_tokens=0,
                prefill_pairs=0,
                joules=report.joules,
            )
            self.gpu.worked(work)
            tell(report)

        await self.engine.watch(both)


def test_a_real_gpu_has_its_clock_set_and_its_counter_read(tmp_path):
    async def run():
        engine, gpu = engine_and_gpu(Law(by_clock=True))
        plan = dataclasses.replace(PLAN, points=5)
        return await profile_live(Drawing(engine, gpu), Device(gpu=gpu, clocks_mhz=CLOCKS), plan, tmp_path / "p.csv")

    virtually(run())
    frame = read_profile(tmp_path / "p.csv")
    assert set(frame["watts_by"]) == {"counted"}
    assert set(frame["any_clock"]) == {0}
    decode = frame.filter((pl.col("prompts") == 0) & (pl.col("batch") == 8))
    slow, fast = (decode.filter(pl.col("clock_mhz") == clock)["seconds"].median() for clock in (700, 1400))
    assert slow == pytest.approx(2 * fast, rel=0.02)
    for clock in CLOCKS:
        watts = decode.filter(pl.col("clock_mhz") == clock)["watts"]
        assert watts.median() == pytest.approx(clock / 10 + 8, rel=0.03)


class Switching(SimulatedGpu):
    """It shows what its switches take: the longer the lower the clock."""

    last = None

    async def set_clock(self, mhz, sent=None):
        seconds = {700: 0.03, 1050: 0.02, 1400: 0.01}.get(mhz, 0.0)
        await asyncio.sleep(seconds)
        if mhz is not None and mhz != self.read().clock_mhz:
            self.last = Switch(mhz=mhz, seconds=seconds)
        return await super().set_clock(mhz, sent)

    def read(self):
        return dataclasses.replace(super().read(), switch=self.last)


@pytest.mark.parametrize("end", [".csv", ".parquet"])
def test_what_switches_take_is_in_every_row_of_their_clock(tmp_path, end):
    out, said = tmp_path / f"p{end}", []

    async def run():
        engine, gpu = engine_and_gpu(kind=Switching)
        plan = dataclasses.replace(PLAN, points=3)
        return await profile_live(Drawing(engine, gpu), Device(gpu=gpu, clocks_mhz=CLOCKS), plan, out, say=said.append)

    virtually(run())
    frame = read_profile(out)
    rows = frame.select("clock_mhz", "switches", "switch_s").unique().sort("clock_mhz").rows()
    assert rows == [(700, FEWEST, 0.03), (1050, FEWEST, 0.02), (1400, FEWEST, 0.01)]
    assert switches_of(frame, 1) == tuple(ProfiledSwitches(mhz=mhz, count=n, within_s=s) for mhz, n, s in rows)
    assert switches_of(frame.with_columns(switches=0), 1) == switches_of(frame.drop("switch_s"), 1) == ()
    assert "switches of clocks: 60 timed, nearly all within 30 ms" in said


def test_a_quick_profile_says_so_in_every_row(tmp_path):
    quick = dataclasses.replace(quick_plan(), points=3, steps=3, bursts=2)
    assert is_quick(profiled(tmp_path / "quick.csv", plan=quick))
    assert not is_quick(profiled(tmp_path / "full.csv", plan=dataclasses.replace(PLAN, points=2)))


@pytest.mark.parametrize("name", Catalogue.load().gpus)
def test_quick_clocks_are_the_ends_and_two_between(name):
    gpu = Catalogue.load().gpu(name)
    clocks = quick_clocks(gpu)
    assert 3 <= len(clocks) <= 4 and set(clocks) <= set(gpu.clocks_mhz)
    assert clocks[-1] == gpu.clock_max_mhz and clocks[0] < 0.5 * gpu.clock_max_mhz


def test_never_more_than_the_engine_holds(tmp_path):
    engines = []

    def counted(plain):
        engines.append(Silent(plain))
        return engines[0]

    frame = profiled(tmp_path / "p.csv", engine=counted)
    assert engines[0].most == 8
    assert frame["kv_blocks"].max() <= 400
    assert engines[0].engine._engine.batcher.preemptions == 0


def test_a_small_profile_trains_and_scores(tmp_path):
    frame = profiled(tmp_path / "p.csv", plan=LivePlan(points=30, steps=4, bursts=4))
    card = score_profile(frame, dataclasses.replace(settings_for(frame), rounds=40, learning_rate=0.2))
    names = {score.split for score in card.scores}
    # Every clock has the same seconds: left-out clocks would prove nothing.
    assert "clocks left out" not in names
    assert {"random 90/10", "batch sizes left out"} <= names
    assert card.score("random 90/10").mape_seconds < 0.15


# ---- interruptions -------------------------------------------------------------------------------------------


KNOWN = ["point", "batch", "prefill_tokens", "prompts", "clock_mhz", "kv_blocks"]


def test_interrupted_and_resumed_is_the_same_profile(tmp_path):
    whole = profiled(tmp_path / "whole.csv")
    out = tmp_path / "p.csv"
    said = []
    with pytest.raises(asyncio.CancelledError):
        profiled(out, engine=lambda plain: Interrupted(plain, calls=40), said=said)
    part = read_profile(out)
    assert 0 < part.height < whole.height
    assert "--resume" in said[-1]
    lines = checkpoint_of(out).read_text().splitlines()
    # A crash may cut the last line short.
    checkpoint_of(out).write_text("\n".join(lines) + '\n{"point": "9')
    said.clear()
    rest = profiled(out, resume=True, said=said)
    assert any(f"{len(lines) - 1} points are measured already" in line for line in said)
    assert rest.select(KNOWN).equals(whole.select(KNOWN))
    assert rest["seconds"].to_list() == pytest.approx(whole["seconds"].to_list(), rel=1e-6)


class Interrupted(Silent):
    """Reports its steps; after some requests the user presses Ctrl-C."""

    async def watch(self, tell):
        await self.engine.watch(tell)

    def open(self, call):
        self.left -= 1
        if self.left == 0:
            for task in asyncio.all_tasks():
                if task.get_coro().__name__ == "run":
                    task.cancel()
        return self.engine.open(call)


def test_a_checkpoint_of_another_engine_or_plan_is_refused(tmp_path):
    out = tmp_path / "p.csv"
    with pytest.raises(CheckpointError, match=r"there is no .*p\.csv\.partial to continue"):
        profiled(out, resume=True)
    with pytest.raises(asyncio.CancelledError):
        profiled(out, engine=lambda plain: Interrupted(plain, calls=40))
    with pytest.raises(CheckpointError, match="--resume continues it"):
        profiled(out)
    with pytest.raises(CheckpointError, match="bursts 3 there, 4 now"):
        profiled(out, plan=dataclasses.replace(PLAN, bursts=4), resume=True)
    checkpoint_of(out).write_text(json.dumps({"rows": 1}) + "\n")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        profiled(out, resume=True)


def test_an_engine_that_dies_leaves_what_was_measured(tmp_path):
    class Dying(Interrupted):
        def open(self, call):
            self.left -= 1
            if self.left < 0:
                raise EngineError("it is gone")
            return self.engine.open(call)

    out = tmp_path / "p.csv"
    with pytest.raises(LiveProfileError, match=r"it is gone; [0-9] points are saved in .*--resume continues"):
        profiled(out, engine=lambda plain: Dying(plain, calls=40))
    assert read_profile(out).height > 0


# ---- other clients --------------------------------------------------------------------------------------------------


class Crowded(Silent):
    """An engine with a request of another client, from the `since`-th report to the `until`-th."""

    def __init__(self, engine, *, since=0, until=10**9):
        super().__init__(engine)
        self.since, self.until, self.told = since, until, 0

    async def watch(self, tell):
        def more(report):
            self.told += 1
            there = self.since <= self.told < self.until
            tell(dataclasses.replace(report, running=report.running + there))

        if self.since == 0:
            more(Report(running=0, waiting=0))
            more(Report(running=0, waiting=0))
        await self.engine.watch(more)


def test_another_client_makes_a_point_be_measured_again(tmp_path):
    said = []
    frame = profiled(tmp_path / "p.csv", engine=lambda plain: Crowded(plain, since=200, until=204), said=said)
    assert any(line.startswith("points measured again, because another client") for line in said)
    assert worst(frame) < 1e-6


def test_another_client_that_stays_ends_the_run(tmp_path):
    with pytest.raises(LiveProfileError, match=r"requests are in the engine, and .* ours"):
        profiled(tmp_path / "p.csv", engine=lambda plain: Crowded(plain, since=200))


# ---- refusals ------------------------------------------------------------------------------------------------


def test_an_engine_that_refuses_every_request(tmp_path):
    class Refusing(Silent):
        def open(self, call):
            return self.engine.open(asked(model="another"))

    with pytest.raises(LiveProfileError, match="refuses every synthetic request, the last with 404"):
        profiled(tmp_path / "p.csv", engine=Refusing)
    assert not checkpoint_of(tmp_path / "p.csv").exists(), "nothing to go on with"


def test_the_plan_may_end_by_time(tmp_path):
    few = profiled(tmp_path / "few.csv", plan=LivePlan(points=None, seconds=1.0, steps=3, bursts=3))
    more = profiled(tmp_path / "more.csv", plan=LivePlan(points=None, seconds=4.0, steps=3, bursts=3))
    assert 0 < few["point"].n_unique() < more["point"].n_unique()


def test_profiler_is_built_without_reaching_anything():
    async def run():
        engine, gpu = engine_and_gpu()
        profiler = LiveProfiler(engine, await engine.connect(), modelled(gpu), PLAN)
        return profiler.summary.repeated

    assert virtually(run()) == 0


# ---- clocks ---------------------------------------------------------------------------------------------------


def test_clocks_are_those_of_the_gpu_with_the_top_one():
    assert chosen_clocks(CLOCKS, None) == CLOCKS
    ladder = tuple(range(210, 1411, 15))
    assert len(chosen_clocks(ladder, None)) == 8
    assert chosen_clocks(ladder, None)[-1] == 1410
    assert chosen_clocks(CLOCKS, "1400,700") == (700, 1400)
    with pytest.raises(ValueError, match="no such clock; the nearest is 1050"):
        chosen_clocks(CLOCKS, "1400,1000")
    with pytest.raises(ValueError, match="the top clock, 1400, must be among them"):
        chosen_clocks(CLOCKS, "700,1050")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"clock_mhz": 1050}, "700 MHz, at 1050 MHz: may the keeper set it"),
        ({"clock_mhz": 1050, "held": "power cap"}, "700 MHz, at 1050 MHz: power cap"),
        ({"trouble": "the GPU is lost"}, "the GPU is lost"),
    ],
)
def test_a_clock_that_is_not_reached_ends_the_run_and_is_named(tmp_path, monkeypatch, changes, why):
    async def run():
        engine, gpu = engine_and_gpu()
        read = gpu.read

        def reading():
            found = read()
            return dataclasses.replace(found, **changes) if found.clock_mhz == 700 else found

        monkeypatch.setattr(gpu, "read", reading)
        device = Device(gpu=gpu, clocks_mhz=CLOCKS)
        await profile_live(engine, device, LivePlan(points=2, steps=3, bursts=3), tmp_path / "p.csv")

    with pytest.raises(LiveProfileError, match=why):
        virtually(run())


@pytest.mark.parametrize(
    ("watts", "prompts_s", "found"), [(290.0, 0.9, 300.0), (240.0, 0.4, 240.0), (300.0, 1.0, 300.0), (None, 0.9, None)]
)
def test_watts_of_prompts_without_the_decode_steps_around_them(watts, prompts_s, found):
    assert _without_decode(watts, 1.0, prompts_s, 200.0) == (None if found is None else pytest.approx(found))
