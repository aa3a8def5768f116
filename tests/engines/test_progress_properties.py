"""Iterations inferred from tokens, against those of the batcher: bursts out of order, requests that do not stream."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.live import spec
from throttllem.core.types import Progressed, Stepped
from throttllem.engines.base import Report
from throttllem.engines.progress import Progress
from throttllem.engines.simulated.batcher import Batcher


class World:
    """The batcher as the truth, and what the core would know of every request from the events alone."""

    def __init__(self, spec, seed, *, reports):
        self.batcher = Batcher(spec)
        self.progress = Progress(3, exact=False)
        self.rng = random.Random(seed)
        self.reports = reports
        self.wanted, self.given, self.running, self.silent = {}, {}, set(), set()
        self.start, self.reported, self.ended = {}, -1, {}

    def send(self, key, prompt, answer, *, streams=True):
        self.batcher.add(key, prompt_tokens=prompt, output_tokens=answer, max_tokens=answer)
        self.wanted[key], self.given[key] = answer, 0
        self.progress.dispatched(key, streams=streams)
        self.silent |= set() if streams else {key}

    def burst(self):
        """What comes out of one iteration: tokens, ends after them, and perhaps a report."""
        iteration = self.batcher.begin()
        if iteration is None:
            return []
        self.running -= set(iteration.preempted)
        outcome = self.batcher.end()
        self.running |= set(outcome.started)
        out = [("token", key) for key in sorted(self.running - self.silent)]
        out += [("ended", key) for key in outcome.finished]
        self.running -= set(outcome.finished)
        if self.reports:
            waiting = self.batcher.waiting
            report = Report(running=len(self.batcher) - waiting, waiting=waiting, step=outcome.index)
            out.append(("report", report))
        return out

    def deliver(self, bursts):
        """In any order, except that of one request and that of the reports."""
        lanes = {}
        for what, of in (item for burst in bursts for item in burst):
            lanes.setdefault("report" if what == "report" else of, []).append((what, of))
        while lanes:
            lane = self.rng.choice(sorted(lanes, key=str))
            what, of = lanes[lane].pop(0)
            if not lanes[lane]:
                del lanes[lane]
            self.take(what, of)
            # The first report may be read after tokens of the next step: its number stands for one more then.
            assert self.progress.iteration <= self.batcher.iteration - 1 + self.reports, "ahead of the truth"

    def take(self, what, of):
        match what:
            case "token":
                self.given[of] += 1
                events = self.progress.token(of)
            case "ended":
                events = self.progress.ended(of, self.wanted[of])
                assert self.progress.left(of).request_id == of
            case "report":
                events = self.progress.report(of)
        for event in events:
            self.apply(event)
        if what == "token" and len(events) < 2:
            behind = self.reported - self.start[of] + 1 - self.given[of]
            assert behind >= -1, "a sequence is behind its tokens by more than the blur of a burst"

    def apply(self, event):
        match event:
            case Stepped(iteration=iteration, started=started, finished=finished):
                assert iteration >= max(self.reported, 0)
                self.reported = iteration
                for key in started:
                    assert key not in self.start and key not in self.ended
                    self.start[key] = iteration
                for key in finished:
                    assert key not in self.ended
                    self.ended[key] = iteration - self.start[key] + 1
            case Progressed(request_id=key, tokens=tokens):
                self.start[key] = self.reported - tokens + 1


@st.composite
def worlds(draw):
    found = spec(
        block_tokens=4,
        kv_blocks=draw(st.integers(10, 30)),
        max_batch=draw(st.integers(1, 8)),
        prefill_budget_tokens=draw(st.integers(4, 64)),
        chunked=draw(st.booleans()),
    )
    return World(found, draw(st.integers(0, 2**32)), reports=draw(st.booleans()))


arrivals = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 28), st.integers(0, 3), st.booleans()), min_size=1, max_size=30
)
"""(prompt, answer, blocks of bursts before the next one, streams?)"""


@given(worlds(), arrivals)
def test_inferred_iterations_against_the_batcher(world, arrivals):
    def block():
        world.deliver([world.burst() for _ in range(world.rng.choice((1, 2)))])

    for key, (prompt, answer, blocks, streams) in enumerate(arrivals):
        world.send(key, prompt, answer, streams=streams)
        for _ in range(blocks):
            block()
    for _ in range(10_000):
        if not len(world.batcher):
            break
        block()
    assert world.ended == world.wanted, "every request ends once, with the tokens that it has"
    assert set(world.start) == set(world.wanted)
    assert world.progress.in_flight == {}


@pytest.mark.parametrize("reports", [False, True])
def test_bursts_in_order_are_followed_closely(reports):
    """Eight sequences that come and go: the inferred count keeps up, and each is right within the blur of a burst."""
    world = World(spec(kv_blocks=4000, max_batch=8, prefill_budget_tokens=4096, chunked=True), 1, reports=reports)
    rng = random.Random(2)
    for key in range(60):
        world.send(key, 10, rng.randint(20, 120))
    lags = []
    while len(world.batcher):
        world.deliver([world.burst()])
        lags += [
            abs(world.reported - world.start[key] + 1 - world.given[key]) for key in world.running & set(world.start)
        ]
    assert max(lags) <= 2
    assert sum(lags) / len(lags) < 1
    assert world.reported >= 0.97 * world.batcher.iteration
    assert all(before <= after for before, after in pairwise(sorted(world.ended.values())))
