"""A controller as bytes and back; and bytes from elsewhere, which run nothing."""

import io
import pickle
from array import array
from collections import OrderedDict, deque
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from core.toy import table
from core.world import World
from hypothesis import given
from hypothesis import strategies as st

from gateway.flights import OPTIONS, SPECS, TABLES, busy, deeds, fly
from throttllem.core.controller import Controller
from throttllem.core.external_load import ExternalLoad, OwnLoad
from throttllem.core.lengths.online import OnlineLengthPredictor
from throttllem.core.types import ClockRead, Observed, Reason, Request, Slo, Timer
from throttllem.gateway.flight.checkpoint import CheckpointError, fill, load, make_blank, save, table_digest

DIGESTS = {table_digest(one): one for one in TABLES.values()}


def copied(controller):
    return load(save(controller, table_digest), DIGESTS.__getitem__)


@given(deeds, deeds)
def test_a_copy_goes_on_as_the_original_does(before, after):
    world = World(OPTIONS)
    fly(world, before)
    again = copied(world.controller)
    assert again.snapshot() == world.controller.snapshot()
    assert again.next_deadline() == world.controller.next_deadline()
    mark = len(world.log)
    fly(world, after)
    for now_s, event, commands in world.log[mark:]:
        assert again.handle(event, now_s) == commands
    assert again.snapshot() == world.controller.snapshot()


def test_what_is_shared_stays_shared_and_arrays_stay_exact():
    world = World(OPTIONS)
    busy(world, 60)
    controller = copied(world.controller)
    assert controller._engines.serving in controller._engines.by_id.values()
    assert controller._clocks._load is controller._load
    assert controller.options.tables[2] is TABLES[2]
    for state, before in zip(controller._engines.by_id.values(), world.controller._engines.by_id.values(), strict=True):
        assert state.table is (None if before.table is None else controller.options.tables[state.tp])
        assert np.array_equal(state.board._columns, before.board._columns)
        assert state.board._columns.flags.writeable


def test_clocks_that_are_held_down_stay_held_down():
    world = World(OPTIONS)
    busy(world, 60)
    engine = next(state for state in world.controller._engines.by_id.values() if state.table is not None)
    limit_mhz = engine.table.clocks_mhz[1]
    world.send(ClockRead(engine=engine.engine, mhz=limit_mhz, limit_mhz=limit_mhz))
    again = copied(world.controller)._engines.by_id[engine.engine].table
    assert again.limit_mhz == limit_mhz and again.base is TABLES[engine.tp]
    assert np.array_equal(again.seconds, engine.table.seconds)


def test_a_predictor_that_learns_goes_along():
    predictor = OnlineLengthPredictor()
    for number in range(300):
        request = Request(id=number, arrival_s=0, prompt_tokens=number % 70, max_tokens=200, slo=Slo(), model="m")
        predictor.bound(request)
        if number % 7:  # the others are running still, their bounds given out
            predictor.learn(request, 3 + number % 90)
    again = copied(Controller(replace(OPTIONS, predictor=predictor))).options.predictor
    assert again.state() == predictor.state()
    assert again._issued == predictor._issued
    assert again.bound(request) == predictor.bound(request)
    again.learn(request, 5)
    assert again.state() != predictor.state()


class Elsewhere:
    """A predictor that is not of the core."""

    def predict(self, request):
        return 1.0


def test_a_controller_with_an_object_of_another_package_is_not_written():
    with pytest.raises(CheckpointError, match=r"cannot be written down: .*Elsewhere is nothing that a checkpoint"):
        save(Controller(replace(OPTIONS, predictor=Elsewhere())), table_digest)


PLAIN = [
    deque([1, 2], maxlen=2),
    OrderedDict(a=1),
    MappingProxyType({"a": 1}),
    array("d", [1.5]),
    np.float32(1.5),
    np.arange(6).reshape(2, 3),
    {(1, "x"): frozenset({3})},
    -float("inf"),
    2**90,
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_come_back(value):
    controller = Controller(OPTIONS)
    controller.extra = value
    again = copied(controller).extra
    assert type(again) is type(value)
    assert np.array_equal(again, value) if isinstance(value, np.ndarray) else again == value
    assert getattr(again, "maxlen", None) == getattr(value, "maxlen", None)


def test_the_digest_of_a_table_is_of_its_contents():
    assert table_digest(table(SPECS[1])) == table_digest(TABLES[1])
    assert len({table_digest(one) for one in TABLES.values()}) == len(TABLES)
    watts = TABLES[1].watts.copy()
    watts[0, 0] += 1
    assert table_digest(replace_watts(TABLES[1], watts)) != table_digest(TABLES[1])


def replace_watts(one, watts):
    names = ("clocks_mhz", "batch_bin", "kv_bin", "prefill_bin", "seconds", "hull")
    return type(one)(watts=watts, **{name: getattr(one, name) for name in names})


# ---- untrusted -----------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MAKERS = b"cthrottllem.gateway.checkpoint\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(Calls(eval, "1/0"), protocol=4), r"names builtins.eval, which is not allowed: refused"),
        (pickle.dumps(Calls(print, "owned"), protocol=4), r"names builtins.print, which is not allowed"),
        (pickle.dumps(Calls(io.open, "/dev/null"), protocol=4), r"which is not allowed"),
        (pickle.dumps(np.zeros(2), protocol=4), "is not allowed"),
        (pickle.dumps(Timer(), protocol=4), "uses NEWOBJ, which is not allowed: refused"),
        (pickle.dumps(Calls(eval, "1/0"), protocol=0), "uses GLOBAL, which is not allowed"),
        (b"cos\nsystem\n(S'true'\ntR.", "uses GLOBAL, which is not allowed"),
        (b"(S'true'\nios\nsystem\n.", "is not allowed"),
        (b"\x80\x04\x82\x01.", "uses EXT1"),
        (b"\x80\x04}}b.", "uses BUILD, which is not allowed: refused"),
        (b"\x80\x04\x8c\x07../../x\x94Q.", "by what is no digest"),
        (b"\x80\x04K\x01.", "holds a int, not a controller"),
        (b"", "damaged"),
        (b"\x80\x04\x95garbage", "damaged"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else "",
)
def test_an_untrusted_pickle_is_an_error(data, message):
    with pytest.raises(CheckpointError, match=message):
        load(data, DIGESTS.__getitem__)


def call(maker, *arguments):
    """A pickle that calls one of the callables that are allowed."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=4)
    pickler.dump(arguments)
    body = out.getvalue()[2:-1]  # between PROTO and STOP
    name = maker.encode()
    module = b"throttllem.gateway.flight.checkpoint"
    stack_global = b"\x8c%c%s\x8c%c%s\x93" % (len(module), module, len(name), name)
    frameless = body[9:] if body[:1] == b"\x95" else body
    return b"\x80\x04" + stack_global + frameless + b"R."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (call("make_blank", "os:_wrap_close"), "which is not of the core: refused"),
        (call("make_blank", "throttllem.core.lengths.prediction:NormalDist"), "no class of the core: refused"),
        (call("make_blank", "throttllem.core.lengths.prediction:math"), "no class of the core: refused"),
        (call("make_blank", "throttllem.core.lengths.prediction:Oracle.__init__"), "not of the core: refused"),
        (call("make_blank", "throttllem.core.types:Yesterday"), "holds a Yesterday, which this build does not have"),
        (
            call("make_blank", "throttllem.core.yesterday:SequenceState"),
            "holds a SequenceState, which this build does not have",
        ),
        (call("make_member", "throttllem.core.types:Request", 1), "has no members"),
        (call("make_member", "throttllem.core.types:Reason", "because"), "'because' is not a valid Reason"),
        (call("make_tuple", "throttllem.core.types:Request", [1]), "is no named tuple"),
        (call("fill", [], {"a": 1}), "not of the core: refused"),
        (call("make_array", "|O8", (1,), b"\0" * 8), "numbers of type '|O8': refused"),
        (call("make_array", "<f8", (5,), b"\0" * 8), "damaged"),
        (call("save", 1, 2), "save, which is not allowed"),
    ],
    ids=range(13),
)
def test_what_is_allowed_cannot_be_misused(data, message):
    with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
        load(data, DIGESTS.__getitem__)


def test_fields_of_a_class_are_not_set():
    with pytest.raises(CheckpointError, match="refused"):
        fill(Controller, {"handle": 1})
    with pytest.raises(CheckpointError, match="sets '__class__': refused"):
        fill(Controller(OPTIONS), {"__class__": int})


@given(st.integers(0, 2**32), st.integers(1, 255))
def test_damage_ends_in_one_kind_of_error(where, change):
    """Or in a controller: a number can change and still be one."""
    data = bytearray(WHOLE)
    data[where % len(data)] ^= change
    try:
        found = load(bytes(data), DIGESTS.__getitem__)
    except CheckpointError:
        return
    assert type(found) is Controller
    try:
        commands = found.handle(Timer(), 1e6)
    except (AttributeError, MemoryError, LookupError, ArithmeticError, TypeError, ValueError) as error:
        # A field of another name, a number far too large: one byte in two hundred.
        assert data != WHOLE, error
    else:
        assert all(type(command).__module__ == "throttllem.core.types" for command in commands)


@pytest.mark.parametrize(
    ("obj", "state"),
    [
        (Reason.BATCH, {"_value_": "never"}),
        (TABLES[1], {"watts": None}),
        (Controller(OPTIONS), {"handle": None}),
        (Slo(), {"extra": 1}),
        (Timer(), {"handle": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_an_objects_own_fields_are_set(obj, state):
    with pytest.raises((CheckpointError, AttributeError), match=r"refused|has no attribute"):
        fill(obj, state)
    assert Reason.BATCH.value != "never" and TABLES[1].watts is not None


def whole():
    world = World(OPTIONS)
    busy(world, 30)
    return save(world.controller, table_digest)


WHOLE = whole()


def test_fields_that_are_new_get_their_defaults():
    request = make_blank("throttllem.core.types:Request")
    fill(request, {"id": 1, "arrival_s": 0.0, "prompt_tokens": 1, "max_tokens": 2, "slo": Slo()})
    assert request == Request(id=1, arrival_s=0.0, prompt_tokens=1, max_tokens=2, slo=Slo())


def test_a_meter_of_a_build_that_knew_one_look_only_goes_on():
    meter = make_blank("throttllem.core.external_load:DriftMeter")
    fill(meter, {"corrections": 2, "_batch": 1, "_kv_blocks": None, "_sums": (1, 0), "_times": (1, 0)})
    own = OwnLoad(running=1, kv_blocks=1, pending=0, pending_blocks=0)
    assert meter.compare(Observed(engine=0, running=2, waiting=0, kv_blocks=1), own) == ExternalLoad()
    assert meter.drift().mean_batch == 1.0
