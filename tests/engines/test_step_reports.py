import asyncio
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.upstreams import eventually
from throttllem.engines import step_reports
from throttllem.engines.step_reports import (
    MOST_REQUESTS,
    MOST_STEPS,
    MOST_TOKENS,
    OLDEST_S,
    PACKED,
    StepReceiver,
    StepStats,
    check_address,
    parse_address,
    read_secret,
    unpack,
)

STEP = StepStats(boot=7, sequence=1, step=0, monotonic_s=5.0, running=2, waiting=1, kv_usage=0.25, generated_tokens=2)
SECRET = b"0123456789abcdef"


@pytest.fixture(scope="module", autouse=True)
def the_time_of_the_steps():
    """Steps are received when they were sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_reports, "time", SimpleNamespace(monotonic=lambda: STEP.monotonic_s))
        yield


NUMBER = st.integers(0, MOST_STEPS - 1)
REQUESTS = st.integers(0, MOST_REQUESTS)
TOKENS = st.integers(0, MOST_TOKENS)


@given(
    boot=st.integers(0, 2**64 - 1),
    sequence=NUMBER,
    step=st.none() | NUMBER,
    monotonic_s=st.floats(0, 1e10),
    running=REQUESTS,
    waiting=REQUESTS,
    kv_usage=st.floats(0, 1),
    prompt_tokens=TOKENS,
    generated_tokens=TOKENS,
    preemptions=REQUESTS,
    prefix_queries=TOKENS,
    prefix_hits=TOKENS,
    details=st.none() | st.tuples(REQUESTS, st.floats(0, 86400)),
    speculation=st.none() | st.tuples(TOKENS, TOKENS),
)
def test_unpacks_what_was_packed(details, speculation, **numbers):
    sequences, seconds = details or (None, None)
    drafted, accepted = speculation or (None, None)
    step = StepStats(
        decode_sequences=sequences, seconds=seconds, drafted_tokens=drafted, accepted_tokens=accepted, **numbers
    )
    assert unpack(step.pack()) == step
    assert unpack(step.pack(SECRET), SECRET) == step


@pytest.mark.parametrize(
    "beyond",
    [
        {"step": MOST_STEPS},
        {"step": -1},
        {"sequence": MOST_STEPS},
        {"running": MOST_REQUESTS + 1},
        {"waiting": MOST_REQUESTS + 1},
        {"preemptions": MOST_REQUESTS + 1},
        {"decode_sequences": MOST_REQUESTS + 1, "seconds": 1.0},
        {"prompt_tokens": MOST_TOKENS + 1},
        {"generated_tokens": MOST_TOKENS + 1},
        {"monotonic_s": -1.0},
        {"monotonic_s": float("nan")},
        {"monotonic_s": float("inf")},
        {"decode_sequences": 1, "seconds": float("nan")},
        {"decode_sequences": 1, "seconds": 1e6},
        {"kv_usage": float("nan")},
        {"kv_usage": 1.5},
    ],
    ids=str,
)
def test_numbers_beyond_what_an_engine_can_report_are_garbage(beyond):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100)
    assert receiver.take(replace(STEP, **beyond).pack()) is None
    assert (receiver.garbage, receiver.received) == (1, 0)


@given(
    st.binary(max_size=2 * PACKED.size)
    | st.binary(min_size=PACKED.size - 4, max_size=PACKED.size - 4).map(b"tls2".__add__)
)
def test_garbage_is_counted_and_not_reported(noise):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100)
    report = receiver.take(noise)
    assert receiver.garbage + receiver.received == 1
    assert (report is None) == (receiver.garbage == 1)


def test_reports_of_steps():
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100)
    first = receiver.take(STEP.pack())
    assert (first.step, first.running, first.waiting, first.kv_blocks, first.seconds) == (0, 2, 1, 25, None)
    assert (first.generated_tokens, first.started, first.finished) == (2, None, None)
    second = receiver.take(replace(STEP, sequence=2, step=1, monotonic_s=5.5, running=0, waiting=0).pack())
    assert (second.step, second.seconds) == (1, 0.5)
    # Nothing ran between: the gap is no step's time.
    third = receiver.take(replace(STEP, sequence=3, step=2, monotonic_s=9.0).pack())
    assert third.seconds is None
    empty = receiver.take(replace(STEP, sequence=4, step=None, monotonic_s=9.1).pack())
    assert (empty.step, empty.running, empty.seconds, empty.generated_tokens) == (None, 2, None, None)


def test_the_engines_own_measure_of_a_step_goes_first():
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100)
    receiver.take(STEP.pack())
    step = receiver.take(replace(STEP, sequence=2, step=1, monotonic_s=6.0, decode_sequences=2, seconds=0.125).pack())
    assert (step.seconds, step.decode_sequences) == (0.125, 2)


def test_lost_and_repeated_datagrams_and_those_of_another_boot_are_counted():
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100)
    receiver.take(STEP.pack())
    gap = receiver.take(replace(STEP, sequence=5, step=4, monotonic_s=6.0).pack())
    assert (receiver.lost, gap.step, gap.seconds) == (3, 4, None)
    assert receiver.take(replace(STEP, sequence=5, step=4).pack()) is None
    assert receiver.take(replace(STEP, sequence=6, step=5, boot=8).pack()) is None
    assert (receiver.received, receiver.garbage, receiver.other_boots) == (2, 1, 1)


@given(position=st.integers(0, PACKED.size + 31), bit=st.integers(0, 7))
def test_a_changed_bit_is_garbage_where_there_is_a_secret(position, bit):
    datagram = bytearray(STEP.pack(SECRET))
    datagram[position] ^= 1 << bit
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100, secret=SECRET)
    assert receiver.take(bytes(datagram)) is None
    assert receiver.take(STEP.pack()) is None
    assert (receiver.garbage, receiver.received) == (2, 0)
    assert receiver.take(STEP.pack(SECRET)) is not None


@pytest.mark.parametrize("boot", [6, 8])
def test_steps_of_another_start_than_the_engine_reports_never_count(boot):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100, boot=7)
    assert receiver.take(replace(STEP, boot=boot, sequence=9, step=10**6).pack()) is None
    assert receiver.take(STEP.pack()) is not None
    assert (receiver.received, receiver.other_boots) == (1, 1)


@pytest.mark.parametrize(
    ("sequence", "step", "elapsed_s", "counts"),
    [
        (2, 1, 0.0, True),
        (4097, 4096, 0.0, True),
        (4098, 4097, 0.0, False),
        (4098, 4097, 1.0, True),
        (2, 2, 60.0, False),
        (3, 0, 60.0, False),
        (MOST_STEPS - 1, 1, 60.0, False),
    ],
)
def test_numbers_jump_no_further_than_an_engine_steps(sequence, step, elapsed_s, counts):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100)
    receiver.take(STEP.pack(), 5.0)
    report = receiver.take(replace(STEP, sequence=sequence, step=step).pack(), 5.0 + elapsed_s)
    assert (report is not None) is counts
    if not counts:  # it did not take the place of the next true one
        assert receiver.take(replace(STEP, sequence=3, step=1).pack(), 5.0 + elapsed_s) is not None


@pytest.mark.parametrize("boot", [None, 7])
def test_a_first_datagram_that_was_recorded_does_not_count(boot, caplog):
    receiver = StepReceiver("127.0.0.1:0", kv_blocks=100, boot=boot)
    now_s = STEP.monotonic_s + OLDEST_S + 1.0
    for late_s in (now_s, 0.0, now_s):  # long ago, and by another machine's clock
        sent = replace(STEP, monotonic_s=1e6 if not late_s else STEP.monotonic_s, boot=7)
        assert receiver.take(sent.pack(), now_s) is None
    assert (receiver.garbage, receiver.boot, len(caplog.records)) == (3, boot, 1)
    assert receiver.take(replace(STEP, monotonic_s=now_s).pack(), now_s) is not None
    # One that waited in the socket while the gateway was busy counts, as its number is new.
    assert receiver.take(replace(STEP, sequence=2, step=1, monotonic_s=now_s).pack(), now_s + 60.0) is not None


@pytest.mark.parametrize(
    ("mode", "text", "words"),
    [(0o640, "0123456789abcdef", "chmod 600"), (0o600, "short", "16 bytes"), (None, "", "No such file")],
)
def test_a_secret_that_is_none_is_refused(tmp_path, mode, text, words):
    path = tmp_path / "secret"
    if mode is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(ValueError, match=words):
        read_secret(path)


def test_a_socket_is_not_put_where_others_can_write(tmp_path):
    folder = tmp_path / "made"
    check_address(str(folder / "steps"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o1777)
    with pytest.raises(OSError, match="other users can write"):
        check_address(str(folder / "steps"))


@pytest.mark.parametrize(
    ("text", "family", "address"),
    [
        ("/run/x.sock", socket.AF_UNIX, "/run/x.sock"),
        ("./x", socket.AF_UNIX, str(Path.cwd() / "x")),
        ("127.0.0.1:9911", socket.AF_INET, ("127.0.0.1", 9911)),
        ("localhost:1", socket.AF_INET, ("127.0.0.1", 1)),
        ("[::1]:2", socket.AF_INET6, ("::1", 2)),
    ],
)
def test_addresses(text, family, address):
    assert parse_address(text) == (family, address)


@pytest.mark.parametrize(
    "text", ["", "x.sock", "0.0.0.0:1", "192.0.2.1:1", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"]
)
def test_only_this_machine(text):
    with pytest.raises(ValueError, match="stats = "):
        parse_address(text)


def send(address, *datagrams):
    family, where = parse_address(address)
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for datagram in datagrams:
            sender.sendto(datagram, where)


def free_udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["unix", "udp"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_datagrams_arrive(tmp_path, kind, loop):
    address = str(tmp_path / "steps.sock") if kind == "unix" else free_udp()

    async def run():
        reports = []
        receiver = StepReceiver(address, kv_blocks=8)
        with receiver.listening(reports.append):
            assert receiver.is_listening
            send(
                address,
                STEP.pack(),
                b"garbage",
                STEP.pack()[:-1],
                STEP.pack() + b"x",
                replace(STEP, sequence=2, step=1).pack(),
            )
            await eventually(lambda: receiver.garbage == 3 and len(reports) == 2)
        assert not receiver.is_listening

    if loop == "asyncio":
        asyncio.run(run())
    else:
        import uvloop  # noqa: PLC0415

        uvloop.run(run())
    assert not (tmp_path / "steps.sock").exists()


def test_a_unix_socket_is_this_users_only(tmp_path):
    path = tmp_path / "steps.sock"

    async def run():
        with StepReceiver(str(path), kv_blocks=8).listening(print):
            return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(0)
    try:
        assert asyncio.run(run()) == 0o600
    finally:
        os.umask(before)


def test_a_socket_left_behind_is_taken_away_but_a_live_one_is_not(tmp_path):
    path = str(tmp_path / "steps.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(path)

    async def run():
        receiver = StepReceiver(path, kv_blocks=8)
        with receiver.listening(print):
            with pytest.raises(OSError, match="cannot listen"):
                check_address(path)
            with pytest.raises(OSError, match="cannot listen"), StepReceiver(path, kv_blocks=8).listening(print):
                raise AssertionError("two listen")
            assert receiver.is_listening
            send(path, STEP.pack())

    asyncio.run(run())
    check_address(path)


def test_a_file_in_the_way_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot listen"):
        check_address(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_needs_the_standard_library_only():
    code = (
        "import sys, throttllem.engines.step_reports; "
        "heavy = {'numpy', 'polars', 'pydantic', 'aiohttp', 'typer'} & set(sys.modules); sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
