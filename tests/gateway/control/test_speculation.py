"""An engine that speculates: its rate is learned, SLOs are met, tokens cost less, and as many are counted as it gave
whenever its counters are read.
"""

import asyncio
import contextlib
import random

import pytest
from aiohttp import web

from gateway.peer import Peer, with_peer
from gateway.rig import rig, virtually
from throttllem.core.types import RateChanged, Slo
from throttllem.gateway.telemetry.status import gateway_status
from tools.testbed.engines.garbage_engine import CHUNK


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


# ---- counters that are read from time to time --------------------------------------------------------------------

GIVEN, A_STEP = 200, 4
STEP_S = 0.001


class Speculating(Peer):
    """All its streams get `A_STEP` tokens in one event at each step, and end before their limit: without a count."""

    def __init__(self):
        super().__init__()
        self.generated, self.steps = 0, set()
        self.looked = asyncio.Event()

    def page(self):
        self.looked.set()
        self.iterations, accepted = len(self.steps), self.generated * (A_STEP - 1) // A_STEP
        counters = f"vllm:generation_tokens_total {self.generated}\n"
        return super().page() + counters + f"vllm:spec_decode_num_accepted_tokens_total {accepted}\n"

    async def _stream(self, request, tokens):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(min(tokens, GIVEN) // A_STEP):
            now_s = asyncio.get_running_loop().time()
            number = now_s // STEP_S + 1
            await asyncio.sleep(number * STEP_S - now_s)
            self.steps.add(number)
            self.generated += A_STEP
            await response.write(CHUNK)
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.mark.parametrize(
    "later_s", [0.1, *(pytest.param(later_s, marks=pytest.mark.slow) for later_s in (0.0, 0.41, 0.47))]
)
def test_as_many_tokens_are_booked_as_were_given_whenever_the_counters_are_read(tmp_path, later_s):
    """The gateway looks twice a second; the streams take 0.05 s, and begin `later_s` after a look."""

    async def check(there, peer):
        before, given = there.loop.generated_tokens, peer.generated
        for at_once in (1, 4, 1, 4):
            peer.looked.clear()
            await peer.looked.wait()
            await asyncio.sleep(later_s)
            for _ in range(2):  # the second begins after steps that no look has shown yet
                asked = [there.client.ask(tokens=2 * GIVEN, stream=True) for _ in range(at_once)]
                assert all(answer.served for answer in await asyncio.gather(*asked))
        return there.loop.generated_tokens - before, peer.generated - given

    booked, given = with_peer(check, tmp_path, kind=Speculating)
    assert given == 20 * GIVEN
    assert booked == pytest.approx(given, rel=0.05)
