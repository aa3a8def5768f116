"""A controller as JSON and back: it goes on as the original does, and what is damaged is refused."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from core.columns import same_columns
from core.toy import table
from core.world import World
from hypothesis import given
from hypothesis import strategies as st

from gateway.flight.flights import OPTIONS, SPECS, TABLES, busy, deeds, fly
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.controller import Controller
from throttllem.core.lengths.online import OnlineLengthOptions, OnlineLengthPredictor
from throttllem.core.lengths.prediction import MaxTokens, Noisy, Oracle
from throttllem.core.options import AdmissionOptions, Unmeetable
from throttllem.core.pool.pool import PoolOptions
from throttllem.core.types import ClockRead, Request, Slo, Timer
from throttllem.gateway.flight import wire
from throttllem.gateway.flight.checkpoint import CheckpointError, load, save, table_digest

DIGESTS = {table_digest(one): one for one in TABLES.values()}


def saved(controller):
    return json.loads(wire.dumps(save(controller, table_digest)))


def copied(controller):
    return load(saved(controller), DIGESTS.__getitem__)


VARIANTS = (
    OPTIONS,
    replace(
        OPTIONS,
        throttle=ThrottleOptions(policy=ClockPolicy.THROTTLLEM),
        predictor=OnlineLengthPredictor(OnlineLengthOptions(exceed=0.5, prior_answers=1.0)),
    ),
    replace(OPTIONS, admission=AdmissionOptions(unmeetable=Unmeetable.REJECT), autoscale=None, specs={}),
    replace(OPTIONS, pool=PoolOptions(gpus=6, engines={1: 3})),
    replace(OPTIONS, pool=PoolOptions(gpus=6, engines={1: 2, 2: 1}), autoscale=None),
    replace(OPTIONS, pool=PoolOptions(gpus=4, engines={1: 2}), throttle=ThrottleOptions(policy=ClockPolicy.THROTTLLEM)),
)


@given(deeds, deeds, st.sampled_from(VARIANTS))
def test_a_copy_goes_on_as_the_original_does(before, after, options):
    world = World(options)
    fly(world, before)
    again = copied(world.controller)
    assert again.snapshot() == world.controller.snapshot()
    assert again.next_deadline() == world.controller.next_deadline()
    mark = len(world.log)
    fly(world, after)
    for now_s, event, commands in world.log[mark:]:
        assert again.handle(event, now_s) == commands
    assert again.snapshot() == world.controller.snapshot()


def test_a_copy_shares_tables_and_nothing_else():
    world = World(OPTIONS)
    busy(world, 60)
    controller = copied(world.controller)
    assert controller.options.tables[2] is TABLES[2]
    for state, before in zip(controller.state().engines, world.controller.state().engines, strict=True):
        assert state.table is (None if before.table is None else controller.options.tables[state.tp])
        assert same_columns(state.board, before.board)
    text = wire.dumps(saved(world.controller))
    busy(world, 60)
    assert wire.dumps(saved(controller)) == text


def test_clocks_that_are_held_down_stay_held_down():
    world = World(OPTIONS)
    busy(world, 60)
    engine = next(state for state in world.controller.state().engines if state.table is not None)
    limit_mhz = engine.table.clocks_mhz[1]
    world.send(ClockRead(engine=engine.engine, mhz=limit_mhz, limit_mhz=limit_mhz))
    (again,) = [state.table for state in copied(world.controller).state().engines if state.engine == engine.engine]
    assert again.limit_mhz == limit_mhz and again.base is TABLES[engine.tp]
    assert np.array_equal(again.seconds, engine.table.seconds)


def test_a_corrected_table_stays_corrected():
    world = World(OPTIONS)
    busy(world, 60)
    engine = next(state for state in world.controller.state().engines if state.table is not None)
    engine.table = engine.table.corrected((1.25, 1.0, 1.0, 0.9)).capped(engine.table.clocks_mhz[1])
    (again,) = [state.table for state in copied(world.controller).state().engines if state.engine == engine.engine]
    assert (again.factors, again.limit_mhz) == ((1.25, 1.0, 1.0, 0.9), engine.table.clocks_mhz[1])
    assert again.base is TABLES[engine.tp]
    assert np.array_equal(again.seconds, engine.table.seconds)
    data = json.loads(wire.dumps(save(world.controller, table_digest)).replace("*1.25,", "*7.25,"))
    with pytest.raises(CheckpointError, match="no factors of its bands"):
        load(data, DIGESTS.__getitem__)


def test_a_predictor_that_learns_goes_along():
    predictor = OnlineLengthPredictor()
    for number in range(300):
        request = Request(id=number, arrival_s=0, prompt_tokens=number % 70, max_tokens=200, slo=Slo(), model="m")
        predictor.predict(request)
        if number % 7:  # the others still run, their bounds given out
            predictor.learn(request, 3 + number % 90)
    again = copied(Controller(replace(OPTIONS, predictor=predictor))).options.predictor
    assert again.state() == predictor.state()
    assert again._issued == predictor._issued
    assert again.predict(request) == predictor.predict(request)
    again.learn(request, 5)
    assert again.state() != predictor.state()


@pytest.mark.parametrize("predictor", [Oracle(), Noisy(p95_error=0.3, seed=7), MaxTokens()])
def test_options_come_back(predictor):
    admission = AdmissionOptions(patience=math.inf, unmeetable=Unmeetable.REJECT)
    options = replace(OPTIONS, predictor=predictor, admission=admission, autoscale=None)
    assert copied(Controller(options)).options == options


@dataclass
class Elsewhere:
    """A predictor that is not of the core."""


def test_a_controller_with_a_foreign_part_is_not_recorded():
    with pytest.raises(CheckpointError, match=r"cannot be recorded: a Elsewhere of .*test_checkpoint cannot be"):
        save(Controller(replace(OPTIONS, predictor=Elsewhere())), table_digest)


def test_the_digest_of_a_table_is_of_its_contents():
    assert table_digest(table(SPECS[1])) == table_digest(TABLES[1])
    assert len({table_digest(one) for one in TABLES.values()}) == len(TABLES)
    watts = TABLES[1].watts.copy()
    watts[0, 0] += 1
    names = ("clocks_mhz", "batch_bin", "kv_bin", "prefill_bin", "seconds", "hull")
    changed = type(TABLES[1])(watts=watts, **{name: getattr(TABLES[1], name) for name in names})
    assert table_digest(changed) != table_digest(TABLES[1])


# ---- damaged, or from an unknown source --------------------------------------------------------------------------


def whole():
    world = World(OPTIONS)
    busy(world, 30)
    assert any(len(state.board) for state in world.controller.state().engines), "a busy engine is recorded too"
    return saved(world.controller)


WHOLE = whole()
ENGINE = ["state", "engines", 0]


def changed(path, value):
    """`WHOLE` with one value replaced."""
    data = json.loads(json.dumps(WHOLE))
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["options"], None, "damaged"),
        (["options", "extra"], 1, "has no field 'extra' in this build"),
        (["options", "throttle", "policy"], "fastest", "'fastest' is not a valid ClockPolicy"),
        (["options", "throttle", "dwell_s"], -1.0, r"throttle.dwell_s = -1.0: must be between"),
        (["options", "tables", "1"], "../../x", "names a table '../../x', which is no digest"),
        (["options", "tables", "1"], 5, "5 is not a text"),
        (["options", "specs"], {"one": {}}, "options.specs: invalid literal"),
        (["predictor", "k"], "Popen", "'Popen' is no predictor that this build knows"),
        (["predictor", "k"], "LengthPredictor", "no predictor that this build knows"),
        (["predictor", "k"], ["Noisy"], "damaged"),
        (["state", "serving"], 77, "damaged"),
        (["state", "counts", "arrived"], "many", "state.counts.arrived: 'many' is not a whole number"),
        (["state", "load", "sums"], [1.0], r"state.load.sums: \[1.0\] does not hold 3 values"),
        ([*ENGINE, "phase"], "asleep", "'asleep' is not a valid Phase"),
        ([*ENGINE, "board"], [], r"state.engines.board: \[\] is not an object"),
        ([*ENGINE, "board", "block_tokens"], -1, "damaged"),
        ([*ENGINE, "board", "sequences", 0, "output_tokens"], -1, r"output_tokens: -1 is not between 0 and"),
        ([*ENGINE, "board", "sequences", 0, "done_tokens"], -(2**40), "done_tokens: -1099511627776 is not between"),
        ([*ENGINE, "board", "sequences", 0, "request", "sequences"], 0, "sequences: 0 is not between 1 and"),
        (
            [*ENGINE, "board", "sequences", 0, "request", "prompt_tokens"],
            2**40,
            "prompt_tokens: 1099511627776 is not between",
        ),
        ([*ENGINE, "spec", "prefill_budget_tokens"], 0, r"engine.prefill_budget_tokens = 0: must be between 1"),
        ([*ENGINE, "spec", "max_batch"], 0, r"engine.max_batch = 0: must be between 1"),
        (
            [*ENGINE, "spec", "clocks_mhz"],
            [1000, 600],
            r"engine.clocks_mhz = \(1000, 600\): must be positive, ascending",
        ),
        ([*ENGINE, "spec", "clocks_mhz"], list(range(1, 500)), "has other clocks than its performance table"),
        ([*ENGINE, "steady"], {"watts": "text", "stretch": []}, "steady.watts: 'text' is not a list"),
        ([*ENGINE, "steady"], {"watts": ["x"], "stretch": []}, "steady.watts: holds no numbers"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_is_no_state_is_refused(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        load(changed(path, value), DIGESTS.__getitem__)


def paths(value, so_far=()):
    """The way to every value in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*so_far, key)
        yield from paths(item, (*so_far, key))


junk = st.sampled_from([None, True, -1, 0, 2**70, 1e300, math.nan, "", "x", "AAAA", [], [1], {}, {"k": "Oracle"}])


@given(st.sampled_from(list(paths(WHOLE))), junk)
def test_damage_ends_in_one_kind_of_error_or_in_a_controller(path, value):
    """A number can change and still be one; then events may fail, as the core says when numbers make no sense."""
    try:
        found = load(changed(path, value), DIGESTS.__getitem__)
    except CheckpointError:
        return
    assert type(found) is Controller
    try:
        commands = found.handle(Timer(), 1e6)
    except Exception as error:
        assert type(error).__module__ in {"builtins", "throttllem.core.controller", "numpy.exceptions"}
    else:
        assert all(type(command).__module__ == "throttllem.core.types" for command in commands)


def test_measured_switch_latencies_go_on():
    world = World(OPTIONS)
    busy(world, 60)
    engine = next(state for state in world.controller.state().engines if state.spec is not None)
    top_mhz = engine.spec.clocks_mhz[-1]
    for _ in range(25):
        world.send(ClockRead(engine=engine.engine, mhz=top_mhz, switch_s=0.0123))
    again = copied(world.controller)
    (state,) = [state for state in again.state().engines if state.engine == engine.engine]
    assert state.switch_latency == engine.switch_latency
    assert state.switch_latency.to_s(engine.spec.clocks_mhz, top_mhz, 0.2) == 0.0123
    assert again.snapshot() == world.controller.snapshot()
