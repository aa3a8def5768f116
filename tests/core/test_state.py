"""A controller that continues from the state of another gives the same commands: the recorder relies on it."""

import copy
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from core.stories import SIZES, options, scaling, world
from core.toy import request
from throttllem.core.admission import AdmissionOptions, Unmeetable
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import Noisy
from throttllem.core.types import Observed, Progressed, Slo

MOVES = ("arrive", "arrive", "arrive", "step", "step", "step", "wait", "cancel", "progress", "observe", "clock", "lose")
OPTIONS = (
    lambda: options(predictor=OnlineLengthPredictor(OnlineLengthOptions(exceed=0.5, prior_answers=1.0))),
    lambda: options(ClockPolicy.LEAST_ENERGY, admission=AdmissionOptions(unmeetable=Unmeetable.REJECT)),
    lambda: scaling(predictor=Noisy(p95_error=0.5)),
)
moves = st.lists(st.tuples(st.sampled_from(MOVES), st.integers(1, 30), st.integers(1, 3)), min_size=5, max_size=60)


def copied(controller):
    options = replace(controller.options, predictor=copy.deepcopy(controller.options.predictor))
    return Controller.from_state(options, copy.deepcopy(controller.state()))


class Twins(Controller):
    """Two controllers that handle the same events; they must give the same commands."""

    def __init__(self, first, second):
        self.pair = first, second

    def handle(self, event, now_s):
        one, two = (twin.handle(event, now_s) for twin in self.pair)
        assert one == two
        assert self.pair[0].next_deadline() == self.pair[1].next_deadline()
        assert self.pair[0].snapshot() == self.pair[1].snapshot()
        return one

    def __getattr__(self, name):
        return getattr(self.pair[0], name)

    def next_deadline(self):
        return self.pair[0].next_deadline()

    def snapshot(self):
        return self.pair[0].snapshot()

    def projection(self, engine):
        return self.pair[0].projection(engine)


def play(live, kind, size, width):
    """One thing happens."""
    match kind:
        case "wait":
            live.advance(size / 10)
        case "cancel" if size in live.on or size in live.waiting:
            live.cancel(size)
        case "progress":
            live.send(Progressed(engine=0, request_id=size, tokens=width))
        case "observe":
            live.send(Observed(engine=0, running=width, waiting=0, kv_blocks=size))
        case _:
            play_more(live, kind, size, width)


def play_more(live, kind, size, width):
    match kind:
        case "arrive":
            key = len(live.requests)
            slo = Slo(e2e_s=size / 5, tbt_s=0.05 if size % 2 else None, ttft_s=1.0 if size % 3 else None)
            changes = {"arrival_s": live.now_s, "max_tokens": 40, "slo": slo, "sequences": width}
            live.arrive(request(key, size, 1 + size // width, **changes))
        case "step":
            for key in [key for key, up in live.up.items() if up.in_progress] * size:
                if key in live.up and live.up[key].in_progress:
                    live.advance(0.02)
                    live.end_iteration(key)
        case "clock" if live.switches:
            key, plan = live.switches.pop(0)
            live.read_clock(key, plan.mhz if size % 4 else None)
        case "lose" if size == 30 and live.up:
            live.lose(min(live.up))


@settings(deadline=None)
@given(moves, st.integers(0, 60), st.sampled_from(OPTIONS))
def test_a_copy_gives_the_same_commands(story, when, made):
    live = world(made())
    for index, (kind, size, width) in enumerate(story):
        if index == when % len(story):
            live.controller = Twins(live.controller, copied(live.controller))
        play(live, kind, size, width)
    live.run_out(SIZES.get)
    assert live.ended.keys() == live.requests.keys()
