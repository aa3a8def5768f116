"""An engine that speculates, in virtual time: its rate is learned, SLOs are met, and tokens cost less."""

import asyncio
import contextlib
import random

import pytest

from gateway.rig import rig, virtually
from throttllem.core.types import RateChanged, Slo
from throttllem.gateway.telemetry.status import gateway_status


async def served(speculates, e2e_s):
    """Sixty requests at random times: joules per token, how many met their SLO, the mean error of the KV blocks, the
    most requests taken for lost, and the rates that the core was told.
    """
    dice, errors, lost = random.Random(5), [], [0]
    async with rig(speculates=speculates, numbered=True, kv_blocks=400, max_batch=16) as it:
        await it.up()
        await it.request(tokens=60)  # from which the rate is learned

        async def watched():
            while True:
                await asyncio.sleep(0.2)
                view, report = gateway_status(it.models).models[0].engines[0].view, it.backend.report
                lost.append(view.lost_requests)
                if report.running > 1:
                    errors.append(abs(it.loop.controller.kv_blocks(0) - report.kv_blocks))

        watcher, tasks = asyncio.ensure_future(watched()), []
        for _ in range(60):
            tasks.append(asyncio.ensure_future(it.request(tokens=dice.randint(60, 120), slo=Slo(e2e_s=e2e_s))))
            await asyncio.sleep(dice.expovariate(1 / 0.6))
        await asyncio.gather(*tasks)
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        tokens = sum(session.request.max_tokens for session, _ in it.seen.ends)
        joules = it.backend.accounting.energy().total_j / tokens
        met = sum(met is not False for _, met in it.seen.ends[1:])
        rates = [event.tokens_per_step for event in it.seen.events(RateChanged)]
    return joules, met, sum(errors) / len(errors), max(lost), rates


def test_an_engine_that_speculates_meets_its_slos_with_less_energy():
    plain_j, plain_met, plain_error, plain_lost, plain_rates = virtually(served(1, 6.0))
    fast_j, met, error, lost, rates = virtually(served(3, 6.0))
    assert (plain_met, plain_lost, plain_rates) == (60, 0, [])
    assert (met, lost, rates) == (60, 0, [pytest.approx(3.0)])
    assert fast_j < 0.6 * plain_j
    assert error < 1.2 * plain_error


def test_slos_that_only_speculation_can_meet_are_met():
    _, met, _, lost, _ = virtually(served(3, 1.4))
    assert (met, lost) == (60, 0)
