"""The status of a running gateway: at every stage, of every engine, without ever raising."""

import asyncio
import re
from dataclasses import replace

import pytest

from gateway.rig import rig, virtually
from throttllem.config import LimitOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.forecast.performance_table import TableVerdict
from throttllem.core.types import FrequencyPlan, Observed, Reason, Slo
from throttllem.engines.base import Report
from throttllem.gateway.telemetry.metrics import Histograms, metrics_page
from throttllem.gateway.telemetry.status import decision, gateway_status


@pytest.mark.parametrize("mode", [{}, {"mute": True}, {"numbered": True}, {"tables": False}])
def test_at_every_stage(mode):
    shown = []

    async def run():
        async with rig(max_batch=3, sizes=(1, 2), **mode) as it:

            def look(stage):
                status = gateway_status(it.models)
                metrics_page(status, Histograms())
                shown.append((stage, status.models[0]))

            it.loop.backends[1].engine.gone = True
            look("before")
            await asyncio.sleep(0.3)
            look("away")
            it.loop.backends[1].engine.gone = False
            await it.up()
            look("up")
            requests = [
                asyncio.ensure_future(it.request(tokens=40, stream=n % 2 == 0, slo=Slo(e2e_s=9.0))) for n in range(9)
            ]
            for _ in range(60):
                await asyncio.sleep(0.011)
                look("busy")
            for task in requests[:3]:
                task.cancel()
            await it.loop.backends[1].engine.kill(back=False)
            look("killed")
            await asyncio.sleep(0.5)
            look("down")
            it.loop.backends[1].engine.gone = False
            await asyncio.gather(*requests, return_exceptions=True)
            look("over")
            await it.models.stop()
            look("stopped")

    virtually(run())
    stages = {stage: model.engines[1] for stage, model in shown}
    assert (stages["before"].state, stages["before"].decision) == ("starting", "no decision yet")
    assert (stages["away"].state, stages["away"].trouble) == ("starting", "connection refused")
    assert (stages["up"].state, stages["up"].trouble) == ("up", None)
    assert (stages["down"].state, stages["down"].trouble) == ("starting", "connection refused")
    assert stages["down"].view.phase == "starting"
    assert stages["stopped"].state == "down"
    busy = [model for stage, model in shown if stage == "busy"]
    assert any(model.queue for model in busy)
    if mode.get("tables", True):
        ahead = [model.engines[1].ahead for model in busy if model.engines[1].ahead.at_s]
        assert ahead
        assert all(list(some.at_s) == sorted(some.at_s) and len(some.at_s) <= 120 for some in ahead)
        assert all(some.at_s[0] == 0.0 and max(some.batch) <= 3 for some in ahead)


def test_an_engine_without_progress_is_shown_as_stalled():
    async def run():
        async with rig(mute=True, limits=LimitOptions(silence_s=100.0)) as it:
            await it.up()
            await asyncio.sleep(3600.0)
            states = []

            def engine():
                return gateway_status(it.models).models[0].engines[0]

            async with it.session() as session:
                await session.placed()
                states.append(engine().state)
                await asyncio.sleep(30.0)
                states.append((engine().state, engine().trouble))
            return states, engine().state

    states, after = virtually(run())
    assert states == ["up", ("stalled", "no sign of progress for 30 s")]
    assert after == "up"


def test_external_load_is_noted():
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            await it.request(tokens=3)
            for _ in range(3):
                it.loop.handle(Observed(engine=0, running=5, waiting=0, kv_blocks=9))
            return gateway_status(it.models).models[0].engines[0].notes

    assert any("5 sequences in this engine are not ours" in note for note in virtually(run()))


@pytest.mark.parametrize(
    ("accepted", "profiled", "words"),
    [
        (0, None, []),
        (0, 1.0, []),
        (4, None, ["3.00 tokens a step .* an estimate.*may not have been measured with speculation"]),
        (4, 1.0, ["3.00 tokens a step .* an estimate.*was not measured with speculation"]),
        (4, 3.0, ["3.00 tokens a step lately, by its own counts .scraped from its metrics: an estimate.$"]),
        (0, 3.0, ["table was measured with speculation .3.00 tokens a step., and the engine shows none"]),
    ],
)
def test_speculation_is_noted_with_what_it_rests_on(accepted, profiled, words):
    async def run():
        async with rig(mute=True) as it:
            await it.up()
            options = it.loop.controller.options
            verdict = TableVerdict(tokens_per_step=profiled)
            tables = {tp: replace(table, verdict=verdict) for tp, table in options.tables.items()}
            it.loop.controller.options = replace(options, tables=tables)
            for number in range(9):
                report = Report(
                    running=2, waiting=0, step=number, generated_tokens=2 + accepted, accepted_tokens=accepted
                )
                it.backend.progress.report(report)
            return gateway_status(it.models).models[0].engines[0].notes

    found = [note for note in virtually(run()) if "tokens a step" in note]
    assert [bool(re.search(word, note)) for word, note in zip(words, found, strict=True)] == [True] * len(words)


async def loaded(it, seconds):
    """Three streams at a time, one after the other."""

    async def client():
        while asyncio.get_running_loop().time() < seconds:
            await it.request(tokens=60, slo=Slo(e2e_s=9.0))

    await it.up()
    it.backend.accounting.kv_blocks = lambda: it.loop.controller.kv_blocks(0)
    await asyncio.gather(*(client() for _ in range(3)))


STALE = r"the performance table is stale: .* iterations take 1\.2\d times what it says; it is corrected"
BEYOND = r"the performance table is no basis for a clock: .* take [23]\.\d+ times .*; maximum clock until"


@pytest.mark.parametrize(
    ("mode", "slower", "words"),
    [
        ({}, 1.0, None),
        ({}, 3.0, BEYOND),
        ({}, 1.25, STALE),
        ({"mute": True}, 1.25, STALE),
        ({"numbered": True}, 1.25, STALE),
    ],
)
def test_an_engine_is_held_against_its_table(mode, slower, words):
    async def run():
        async with rig(slower=slower, **mode) as it:
            await loaded(it, 30.0)
            return gateway_status(it.models).models[0].engines[0]

    engine = virtually(run())
    notes = [note for note in engine.notes if "the performance table" in note]
    assert [bool(re.search(words or "", note)) for note in notes] == ([True] if words else [])
    metered = [band for band in engine.table if band.watts_bias is not None]
    assert metered
    for band in metered:
        assert band.seconds_bias == pytest.approx(slower, rel=0.07)
        assert band.watts_bias == pytest.approx(1.0, abs=0.08)
    assert {band.factor for band in engine.table} == {1.0} or words
    assert engine.view.beyond_table == (slower == 3.0)
    if slower == 3.0:
        assert engine.view.plan.mhz == engine.spec.clocks_mhz[-1]


def test_the_counts_of_the_status_are_those_of_the_loop():
    async def run():
        async with rig() as it:
            await it.up()
            await asyncio.sleep(1.0)
            await it.request(tokens=5, count=4, slo=Slo(e2e_s=60.0))
            await it.request(tokens=5, count=4, slo=Slo(e2e_s=0.001))
            await it.request(tokens=5, count=4)
            return gateway_status(it.models)

    status = virtually(run())
    (model,) = status.models
    assert (status.phase, model.names, model.title, model.queue) == ("serving", ("toy",), "toy", 0)
    assert (model.counts.arrived, model.counts.finished) == (3, 3)
    assert (model.prompt_tokens, model.generated_tokens) == (12, 15)
    assert (model.ever.with_slo, model.ever.met, model.ever.e2e_violated) == (2, 1, 1)
    assert model.recent == model.ever
    energy = model.engines[0].energy
    assert 0.0 < energy.idle_j < energy.total_j


def test_a_plan_in_words():
    assert decision(None) == "no decision yet"
    plan = FrequencyPlan(mhz=900, why=Reason.LOWEST_FEASIBLE, binding=4)
    assert decision(plan) == "900 MHz: one clock lower would violate an SLO (request 4)"


@pytest.mark.parametrize(("policy", "warned"), [("THROTTLLEM", 1), ("LEAST_ENERGY", 0)])
def test_the_papers_policy_is_warned_of_where_it_cost_more(policy, warned):
    """Every clock draws the same, so a lower one only takes longer."""

    async def run():
        async with rig(policy=ClockPolicy[policy]) as it:
            await it.up()
            it.backend.accounting.at_maximum.table.watts[:] = 200.0
            it.backend.accounting.gpu._power = lambda mhz, work: 200.0
            for _ in range(25):
                await it.request(tokens=60)
                await asyncio.sleep(2.0)
            return gateway_status(it.models).models[0].engines[0]

    engine = virtually(run())
    notes = [note for note in engine.notes if "more energy than the maximum clock would have (estimate)" in note]
    assert len(notes) == warned
    assert all(f"{-engine.energy.saved:.1%} more energy" in note and "requests/s" in note for note in notes)
