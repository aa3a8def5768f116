"""External load: what differs from the scoreboard, what pending requests explain, when it calls for a plan."""

import pytest

from core.effort import lines_executed
from core.stories import SIZES, arrive, names, options, world
from core.toy import handle, request, spec
from core.world import World
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.controller import Controller
from throttllem.core.external_load import Drift, DriftMeter, ExternalLoad, OwnLoad
from throttllem.core.types import Arrived, EngineReady, Observed, Reason, Stepped

OWN = OwnLoad(running=4, kv_blocks=40, pending=2, pending_blocks=10)


def reported(running, waiting=0, kv_blocks=None):
    return Observed(engine=0, running=running, waiting=waiting, kv_blocks=kv_blocks)


@pytest.mark.parametrize(
    ("observed", "external"),
    [
        # Ours alone: both wait, one is prefilled, both are; one that is not there yet is no difference.
        (reported(4, 2, 40), ExternalLoad()),
        (reported(5, 1, 46), ExternalLoad()),
        (reported(6, 0, 50), ExternalLoad()),
        (reported(4, 0, 40), ExternalLoad()),
        # Another client's request runs, or waits.
        (reported(9, 0, 90), ExternalLoad(batch=3, kv_blocks=40)),
        (reported(4, 5, 40), ExternalLoad(batch=3)),
        (reported(5, 2, 45), ExternalLoad(batch=1)),
        # A request of ours is held up: it waits in the engine (then all are there), or is not there at all.
        (reported(3, 3, 30), ExternalLoad(kv_blocks=-10)),
        (reported(3, 2, 30), ExternalLoad(batch=-1, kv_blocks=-10)),
        (reported(0, 0, 0), ExternalLoad(batch=-4, kv_blocks=-40)),
        # Prompts explain blocks only if one can be under way.
        (reported(4, 2, 45), ExternalLoad(kv_blocks=5)),
        (reported(5, 1, 55), ExternalLoad(kv_blocks=5)),
        # Shared blocks.
        (reported(4, 2, 33), ExternalLoad(kv_blocks=-7)),
    ],
)
def test_the_external_load(observed, external):
    assert seen(DriftMeter(), *[observed] * 3)[-1] == external


def seen(meter, *looks):
    return [meter.compare(look, OWN) for look in looks]


def test_one_report_is_not_enough():
    meter = DriftMeter()
    looks = [reported(9, 0, 90)] * 2 + [reported(8, 0, 52), reported(4, 2, 20)]
    assert seen(meter, *looks) == [ExternalLoad(), ExternalLoad(), ExternalLoad(batch=2, kv_blocks=2), ExternalLoad()]
    assert seen(meter, *[reported(3, 2, 30)] * 3)[-1] == ExternalLoad(batch=-1, kv_blocks=-10)


def test_what_a_report_leaves_out_stays_as_it_was():
    meter = DriftMeter()
    seen(meter, *[reported(9, 0, 62)] * 3)
    assert seen(meter, *[reported(5, 2)] * 3)[-1] == ExternalLoad(batch=1, kv_blocks=12)
    assert DriftMeter().compare(reported(5, 2), OWN) == ExternalLoad()


def test_the_figures():
    meter = DriftMeter()
    assert meter.drift() == Drift()
    for observed in (reported(3, 2, 30), reported(8, 0, 52), reported(4, 2)):
        meter.compare(observed, OWN)
    meter.corrections = 7
    # Batch -1, +2, 0; blocks -10, +2.
    assert meter.drift() == Drift(batch=0, kv_blocks=2, mean_batch=1.0, mean_kv_blocks=6.0, corrections=7)


@pytest.mark.parametrize(
    ("external", "moved"),
    [
        (ExternalLoad(batch=3, kv_blocks=50), False),
        (ExternalLoad(batch=4, kv_blocks=50), True),
        (ExternalLoad(batch=3, kv_blocks=59), False),
        (ExternalLoad(batch=3, kv_blocks=60), True),
        (ExternalLoad(batch=3, kv_blocks=40), True),
    ],
)
def test_a_sequence_or_a_hundredth_of_the_blocks_calls_for_a_plan(external, moved):
    assert external.moved(ExternalLoad(batch=3, kv_blocks=50), 1000) is moved


# ---- through the controller --------------------------------------------------------------------------------


def batch(live):
    return live.controller.projection(0).batch.tolist()


def view(live):
    return live.controller.snapshot().engines[0]


def observe(live, running, waiting=0, kv_blocks=None):
    look = Observed(engine=0, running=running, waiting=waiting, kv_blocks=kv_blocks)
    return [command for _ in range(3) for command in live.send(look)]  # so often it must be seen


def step(live, times=1):
    for _ in range(times):
        live.end_iteration(0)


def test_the_external_load_is_in_every_coming_iteration_until_the_next_report():
    live = world()
    arrive(live, 1, 4, 10)
    step(live, 2)
    own = live.controller.projection(0).kv_blocks.tolist()
    assert (batch(live), view(live).drift) == ([1] * 9, Drift())
    observe(live, 3, 1, 12)
    assert batch(live) == [4] * 8
    # 5 tokens are ours: 2 blocks of 12.
    assert live.controller.projection(0).kv_blocks.tolist() == [blocks + 10 for blocks in own[1:]]
    assert (view(live).external_sequences, view(live).kv_blocks) == (3, 2)
    assert view(live).drift == Drift(batch=2, kv_blocks=10, mean_batch=2.0, mean_kv_blocks=10.0, corrections=1)
    observe(live, 1, 0, 2)
    assert (batch(live), view(live).external_sequences) == ([1] * 8, 0)
    assert view(live).drift == Drift(batch=0, kv_blocks=0, mean_batch=1.0, mean_kv_blocks=5.0, corrections=2)


def test_sequences_of_other_clients_fill_the_batch():
    live = world()
    arrive(live, 1, 4, 40)
    step(live)
    observe(live, 8)
    arrive(live, 2)
    assert live.controller.snapshot().head.why is Reason.BATCH
    assert names(observe(live, 7))[0] == "Dispatch"
    live.run_out(SIZES.get)
    live.check_end()


def test_an_engine_empty_of_ours_admits_the_next_one():
    live = world()
    observe(live, 500, 500, 5000)
    assert names(arrive(live, 1))[0] == "Dispatch"
    live.run_out(SIZES.get)
    live.check_end()


def test_a_request_counts_with_all_its_sequences():
    live = world()
    arrive(live, 1, 4, 8, sequences=3)
    assert batch(live) == [3] * 8
    step(live)
    assert view(live).kv_blocks == 3
    observe(live, 3, 0, 3)
    assert (view(live).external_sequences, view(live).drift.batch, view(live).drift.kv_blocks) == (0, 0, 0)


def test_only_changes_are_planned_for_and_the_rest_is_o1():
    def lines(count, running, kv_blocks):
        large = spec(kv_blocks=100_000, max_batch=1000, prefill_budget_tokens=100_000)
        controller = Controller(options(ClockPolicy.TOP, aware=False))
        handle(controller, EngineReady(engine=0, spec=large), 0.0)
        for key in range(count):
            handle(controller, Arrived(request=request(key, 4, 90)), 0.0)
        handle(controller, Stepped(engine=0, iteration=0, started=tuple(range(count))), 0.1)
        live = Observed(engine=0, running=running, waiting=0, kv_blocks=kv_blocks)
        for _ in range(2):
            handle(controller, live, 0.2)
        return lines_executed(lambda: handle(controller, live, 0.2))

    assert lines(300, 300, 300) == lines(3, 3, 3)
    assert lines(300, 300, 300 + 999) == lines(3, 3, 3)
    assert lines(300, 301, 300) > lines(3, 3, 3)
    assert lines(300, 300, 300 + 1000) > lines(3, 3, 3)


def test_small_moves_add_up_to_one():
    live = World(options())
    live.ready(0, spec(kv_blocks=1000))
    arrive(live, 1, 4, 40)
    step(live)
    for kv_blocks, corrections in ((5, 0), (9, 0), (10, 0), (11, 1), (15, 1)):
        observe(live, 1, 0, kv_blocks)
        assert view(live).drift.corrections == corrections


def test_an_engine_that_never_stepped_can_be_observed():
    live = world()
    observe(live, 2, 1, 7)
    assert (view(live).external_sequences, view(live).kv_blocks) == (3, 0)
