"""The engine's word against the scoreboard's: what counts as a difference, and what waiting rows explain."""

import pytest

from throttllem.core.external_load import Drift, DriftMeter, ExternalLoad, Own
from throttllem.core.types import Observed

OWN = Own(running=4, kv_blocks=40, pending=2, pending_blocks=10)


def told(running, waiting=0, kv_blocks=None):
    return Observed(engine=0, running=running, waiting=waiting, kv_blocks=kv_blocks)


@pytest.mark.parametrize(
    ("observed", "others"),
    [
        # Ours alone: both wait, one is prefilled, both are; one that is not there yet is nobody's loss.
        (told(4, 2, 40), ExternalLoad()),
        (told(5, 1, 46), ExternalLoad()),
        (told(6, 0, 50), ExternalLoad()),
        (told(4, 0, 40), ExternalLoad()),
        # Somebody else runs, or waits.
        (told(9, 0, 90), ExternalLoad(batch=3, kv_blocks=40)),
        (told(4, 5, 40), ExternalLoad(batch=3)),
        (told(5, 2, 45), ExternalLoad(batch=1)),
        # A row of ours is held up: it waits in the engine (then all are there), or is not there at all.
        (told(3, 3, 30), ExternalLoad(kv_blocks=-10)),
        (told(3, 2, 30), ExternalLoad(batch=-1, kv_blocks=-10)),
        (told(0, 0, 0), ExternalLoad(batch=-4, kv_blocks=-40)),
        # Prompts explain blocks only if one can be under way.
        (told(4, 2, 45), ExternalLoad(kv_blocks=5)),
        (told(5, 1, 55), ExternalLoad(kv_blocks=5)),
        # Shared blocks.
        (told(4, 2, 33), ExternalLoad(kv_blocks=-7)),
    ],
)
def test_who_else_is_in_the_engine(observed, others):
    assert seen(DriftMeter(), *[observed] * 3)[-1] == others


def seen(meter, *looks):
    return [meter.compare(look, OWN) for look in looks]


def test_one_look_is_none():
    meter = DriftMeter()
    looks = [told(9, 0, 90)] * 2 + [told(8, 0, 52), told(4, 2, 20)]
    assert seen(meter, *looks) == [ExternalLoad(), ExternalLoad(), ExternalLoad(batch=2, kv_blocks=2), ExternalLoad()]
    assert seen(meter, *[told(3, 2, 30)] * 3)[-1] == ExternalLoad(batch=-1, kv_blocks=-10)


def test_what_the_engine_does_not_say_stays_as_it_was():
    meter = DriftMeter()
    seen(meter, *[told(9, 0, 62)] * 3)
    assert seen(meter, *[told(5, 2)] * 3)[-1] == ExternalLoad(batch=1, kv_blocks=12)
    assert DriftMeter().compare(told(5, 2), OWN) == ExternalLoad()


def test_the_figures():
    meter = DriftMeter()
    assert meter.drift() == Drift()
    for observed in (told(3, 2, 30), told(8, 0, 52), told(4, 2)):
        meter.compare(observed, OWN)
    meter.corrections = 7
    # Batch -1, +2, 0; blocks -10, +2.
    assert meter.drift() == Drift(batch=0, kv_blocks=2, mean_batch=1.0, mean_kv_blocks=6.0, corrections=7)


@pytest.mark.parametrize(
    ("others", "moved"),
    [
        (ExternalLoad(batch=3, kv_blocks=50), False),
        (ExternalLoad(batch=4, kv_blocks=50), True),
        (ExternalLoad(batch=3, kv_blocks=59), False),
        (ExternalLoad(batch=3, kv_blocks=60), True),
        (ExternalLoad(batch=3, kv_blocks=40), True),
    ],
)
def test_a_sequence_or_a_hundredth_of_the_blocks_calls_for_a_plan(others, moved):
    assert others.moved(ExternalLoad(batch=3, kv_blocks=50), 1000) is moved
