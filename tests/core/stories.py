"""Worlds for the controller's tests: one small engine that is up, and requests that arrive."""

from core.toy import request, spec, table
from core.world import World
from throttllem.core.clocks.gathering import HoldPlan
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.options import ControllerOptions

SIZES = {tp: spec(tp=tp, kv_blocks=32 * tp) for tp in (1, 2)}
TABLES = {tp: table(s) for tp, s in SIZES.items()}


def options(policy=ClockPolicy.THROTTLLEM, *, aware=True, **changes):
    whole = {"throttle": ThrottleOptions(policy=policy), "slo_aware": aware, "tables": TABLES}
    return ControllerOptions(**whole | changes)


def scaling(**changes):
    scale = AutoscaleOptions(capacity_rps={1: 1.0, 2: 10.0}, interval_s=1.0, window_s=2.0, grace_s=5.0, headroom=1.0)
    return options(autoscale=scale, specs=SIZES, **changes)


def world(found=None, tp=1):
    made = World(found or options())
    made.ready(0, SIZES[tp])
    return made


def hold_plan(world, *, hold_s, start_s=0.0, token_s=0.02):
    """Requests that can wait are held from now on, whatever the load."""
    world.hold(HoldPlan(hold_s=hold_s, start_s=start_s, token_s=token_s, watts=50.0, watts_at_once=100.0))


def names(commands):
    return [type(command).__name__ for command in commands]


def arrive(world, key, prompt=4, output=8, **changes):
    return world.arrive(request(key, prompt, output, arrival_s=world.now_s, **changes))
