"""Messages between gateway and agent: what is sent is what is read, and nothing else is taken."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.properties import mutated
from throttllem.agent.messages import (
    PROTOCOL,
    Beat,
    Done,
    Found,
    Hello,
    MessageError,
    Read,
    Refused,
    Set,
    from_agent,
    from_gateway,
    line,
)
from throttllem.gpu.device import Reading, Switch

FROM_GATEWAY = (
    Hello(protocol=PROTOCOL, version="1", gpus=["0"], mode="on", clocks_mhz=[600, 1410], ttl_s=3.0),
    Set(number=1, mhz=900),
    Set(number=2, mhz=None),
    Beat(worked_s=0.5),
)
FROM_AGENT = (
    Found(version="1", uuids=["GPU-1"], ladder_mhz=[600, 1410]),
    Refused(why="it is taken"),
    Done(number=1, mhz=None),
    Read(unreadable="gone"),
    Read.of(Reading(clock_mhz=900, watts=120.5, energy_j=3.0, switch=Switch(mhz=900, seconds=0.01)), 3),
)


@pytest.mark.parametrize(("read", "messages"), [(from_gateway, FROM_GATEWAY), (from_agent, FROM_AGENT)])
def test_sent_and_read(read, messages):
    for message in messages:
        sent = line(message)
        assert sent.endswith(b"\n") and sent.count(b"\n") == 1
        assert read(sent) == message


def test_a_reading_is_the_same_at_the_other_end():
    switch = Switch(mhz=900, seconds=0.01)
    reading = Reading(
        clock_mhz=900, watts=120.5, energy_j=3.0, limit_mhz=1200, held="heat", trouble="no keeper", switch=switch
    )
    assert Read.of(reading, 1).reading(switch, energy_j=3.0) == reading


def test_whatever_a_reading_holds_can_be_sent():
    odd = Reading(clock_mhz=0, watts=0.0, energy_j=0.0, trouble="x" * 9000, switch=Switch(mhz=900, seconds=0.0))
    assert from_agent(line(Read.of(odd, 1))).trouble == "x" * 2000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it: Invalid JSON"),
        (b"[]", "it: Input should be"),
        (b'{"kind":"reset"}', "it: Input tag 'reset'"),
        (b'{"kind":"set","number":1,"mhz":"900"}', "set.mhz: Input should be a valid integer"),
        (b'{"kind":"set","number":1,"mhz":-5}', "set.mhz: Input should be greater"),
        (b'{"kind":"set","number":1,"mhz":900,"power":1}', "set.power: Extra inputs"),
        (b'{"kind":"beat","worked_s":NaN}', "beat.worked_s: Input should be a finite number"),
    ],
)
def test_what_is_no_message_says_why(text, why):
    with pytest.raises(MessageError) as caught:
        from_gateway(text)
    assert str(caught.value).startswith(why)


@given(data=st.data(), message=st.sampled_from(FROM_GATEWAY + FROM_AGENT))
def test_mutated_messages_are_read_or_refused(data, message):
    text = data.draw(mutated(line(message)))
    for read in (from_gateway, from_agent):
        try:
            found = read(text)
        except MessageError:
            continue
        assert read(line(found)) == found
        assert len(json.dumps(found.model_dump())) < 200_000
