"""Events and commands as JSON: all of them, exactly, and nothing else."""

import json
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throttllem.core.types import (
    Arrived,
    ClockRead,
    Command,
    EngineReady,
    EngineSpec,
    Event,
    FrequencyPlan,
    RateChanged,
    Reason,
    Request,
    SetClock,
    Slo,
    Stepped,
)
from throttllem.gateway.flight import wire

seconds = st.none() | st.floats(1e-6, 1e6)
whole = st.integers(-(2**70), 2**70)
slos = st.builds(Slo, e2e_s=seconds, tbt_s=seconds, ttft_s=seconds)
requests = st.builds(
    Request,
    id=whole,
    arrival_s=st.floats(allow_nan=False),
    prompt_tokens=st.integers(0, 2**31),
    max_tokens=st.integers(0, 2**31),
    slo=slos,
    output_tokens=st.none() | whole,
    sequences=st.integers(1, 2**53),
    caller=st.text(st.characters()),
    model=st.text(),
)
finite = st.floats(allow_nan=False)
capacity = st.integers(1, 2**53)
specs = st.builds(
    EngineSpec,
    kv_blocks=capacity,
    block_tokens=capacity,
    max_batch=capacity,
    max_context_tokens=capacity,
    prefill_budget_tokens=capacity,
    clocks_mhz=st.sets(st.integers(1, 10_000), min_size=1).map(lambda clocks: tuple(sorted(clocks))),
    idle_w=finite,
    startup_s=finite,
)
drawn = {
    Arrived: st.builds(Arrived, request=requests),
    Stepped: st.builds(Stepped, iteration=st.integers(0, 2**53)),
    EngineReady: st.builds(EngineReady, engine=whole, spec=specs),
    ClockRead: st.builds(ClockRead, switch_s=st.none() | finite),
    RateChanged: st.builds(RateChanged, tokens_per_step=finite),
}
events = st.one_of(*(drawn.get(kind, st.from_type(kind)) for kind in get_args(Event)))
commands = st.one_of(*(st.from_type(kind) for kind in get_args(Command)))


@given(events)
def test_every_event_comes_back(event):
    text = wire.dumps(wire.to_json(event))
    assert "\n" not in text
    again = wire.event_from(json.loads(text))
    assert again == event
    assert wire.dumps(wire.to_json(again)) == text


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"k": "Stepped", "engine": 0, "iteration": -1}, "iteration: -1 is not between 0 and"),
        ({"k": "Stepped", "engine": 0, "iteration": 2**60}, "iteration: 1152921504606846976 is not between 0 and"),
    ],
)
def test_counts_that_no_engine_gives_are_refused(event, problem):
    with pytest.raises(wire.WireError, match=problem):
        wire.event_from(event)


@given(commands, st.data())
def test_a_command_with_another_field_has_another_text(command, data):
    name = data.draw(st.sampled_from([item.name for item in fields(command)]))
    other = replace(command, **{name: getattr(data.draw(st.from_type(type(command))), name)})
    texts = [wire.dumps(wire.to_json(each)) for each in (command, other)]
    assert (texts[0] == texts[1]) == (command == other)
    assert json.loads(texts[0])["k"] == type(command).__name__


def test_defaults_are_left_out_and_the_rest_is_readable():
    assert wire.to_json(Stepped(engine=0, iteration=7)) == {"k": "Stepped", "engine": 0, "iteration": 7}
    plan = FrequencyPlan(mhz=1200, why=Reason.FITS)
    text = wire.dumps(wire.to_json(SetClock(engine=1, plan=plan)))
    assert text == '{"k":"SetClock","engine":1,"plan":{"mhz":1200,"why":"every check passed"}}'


def test_an_equal_value_of_another_type_is_not_taken_for_the_default():
    request = Request(id=1, arrival_s=0, prompt_tokens=1, max_tokens=1, slo=Slo(), sequences=True)
    assert wire.to_json(Arrived(request=request))["request"]["sequences"] is True


def test_numbers_of_numpy_are_written_as_numbers():
    event = ClockRead(engine=np.int64(3), mhz=np.int32(900))
    assert wire.dumps([wire.to_json(event), np.float64(0.1)]) == '[{"k":"ClockRead","engine":3,"mhz":900},0.1]'
    with pytest.raises(TypeError, match="object is nothing that JSON holds"):
        wire.dumps(object())


REQUEST = {"id": 1, "arrival_s": 0.5, "prompt_tokens": 3, "max_tokens": 4, "slo": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "event: 5 is not an object"),
        ({"engine": 1}, "event: None is none that this build knows"),
        ({"k": "Dispatch", "engine": 1, "request_id": 2}, "'Dispatch' is none that this build knows"),
        ({"k": "Stepped", "engine": 1}, "Stepped: .*iteration"),
        ({"k": "Stepped", "engine": True, "iteration": 1}, "Stepped.engine: True is not a whole number"),
        ({"k": "Stepped", "engine": 1, "iteration": 1, "more": 2}, "Stepped: has no field 'more' in this build"),
        ({"k": "Stepped", "engine": 1, "iteration": 1, "started": 3}, "Stepped.started: 3 is not a list"),
        ({"k": "Stepped", "engine": 1, "iteration": 1, "started": ["a"]}, "Stepped.started: 'a' is not a whole number"),
        ({"k": "Arrived", "request": [1]}, r"Arrived.request: \[1\] is not an object"),
        ({"k": "Arrived", "request": REQUEST | {"slo": {"e2e_s": -1.0}}}, "Arrived.request.slo: slo.e2e_s = -1.0"),
        ({"k": "Arrived", "request": REQUEST | {"caller": 4}}, "Arrived.request.caller: 4 is not a text"),
    ],
)
def test_what_is_no_event_is_named(data, message):
    with pytest.raises(wire.WireError, match=message):
        wire.event_from(data)
