"""Replay of a flight record: the same commands from any of its files, or the first difference, or what is wrong."""

import json
import time
from dataclasses import replace

import pytest
from core.toy import table
from hypothesis import given
from hypothesis import strategies as st

from gateway.flight.flights import OPTIONS, SPECS, busy, deeds, fly, recorded_world
from throttllem.core.controller import Controller
from throttllem.core.types import Arrived, Request, Slo, Timer
from throttllem.gateway.flight import replay as replay_module
from throttllem.gateway.flight.recordings import build
from throttllem.gateway.flight.replay import ReplayError, replay


def flown(folder, rounds=150, **changes):
    """One recorded world, and its files in order."""
    world, recorder = recorded_world(folder, **changes)
    busy(world, rounds)
    recorder.close()
    assert recorder.messages == []
    return world, sorted(folder.glob("*.jsonl"))


def edit(path, number, change):
    """Change one line (from 1), read from its JSON and written back."""
    lines = path.read_text().splitlines()
    line = json.loads(lines[number - 1])
    lines[number - 1] = json.dumps(change(line) or line)
    path.write_text("\n".join(lines) + "\n")


def first_line(path, wanted):
    """The number of the first line after the header for which `wanted` is true."""
    lines = path.read_text().splitlines()
    return next(number for number, text in enumerate(lines[1:], start=2) if wanted(json.loads(text)))


def is_dispatch(line):
    return any(command["k"] == "Dispatch" for command in line.get("c", []))


# ---- the same --------------------------------------------------------------------------------------------------


@given(deeds, st.sampled_from([6_000, 1 << 20]), st.sampled_from([1, 7, 1000]))
def test_every_history_replays_from_every_file(tmp_path_factory, history, file_bytes, batch):
    folder = tmp_path_factory.mktemp("records")
    world, recorder = recorded_world(folder, file_bytes=file_bytes, files=1000, batch=batch)
    fly(world, history)
    world.controller.flush()
    recorder.close()
    results = [replay(path) for path in sorted(folder.glob("*.jsonl"))]
    assert [result.first_difference for result in results] == [None] * len(results)
    assert sum(sum(result.events.values()) for result in results) == len(world.log)
    commands = sum(len(commands) for _, _, commands in world.log)
    assert sum(sum(result.commands.values()) for result in results) == commands
    assert all(result.build_matches and not result.cut_off and not result.doubts for result in results)


def test_a_corrected_table_replays_from_every_file(tmp_path):
    """An engine that takes 30 ms an iteration, whatever its table says."""
    options = replace(OPTIONS, autoscale=None, specs={})
    world, recorder = recorded_world(tmp_path, options, file_bytes=15_000, files=1000)
    world.ready(0, SPECS[2])
    for number in range(20):
        world.arrive(
            Request(
                id=number,
                arrival_s=world.now_s,
                prompt_tokens=4,
                max_tokens=60,
                output_tokens=60,
                slo=Slo(e2e_s=9.0),
            )
        )
        while world.on:
            for key, plan in world.switches[:]:
                world.switches.remove((key, plan))
                world.read_clock(key, plan.mhz)
            world.advance(0.03)
            world.end_iteration(0)
    recorder.close()
    (engine,) = world.controller.snapshot().engines
    assert any(band.factor > 1.05 for band in engine.table_drift)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert any("*" in path.read_text().partition("\n")[0] for path in files[1:]), "a file begins with a corrected table"
    assert [replay(path).first_difference for path in files] == [None] * len(files)


def test_the_last_of_many_files_replays_on_its_own(tmp_path):
    world, files = flown(tmp_path, rounds=1000, file_bytes=80_000, files=2)
    assert len(files) == 2
    result = replay(files[-1])
    assert result.first_difference is None
    assert 0 < sum(result.events.values()) < len(world.log) / 2
    assert (result.model, result.policy, result.build) == ("toy/model", "least-energy", build())
    assert 0 < result.recorded_s < world.now_s


def test_progress_rises_to_the_end(tmp_path):
    _, (path,) = flown(tmp_path)
    shares = []
    replay(path, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] < 0.6 < shares[-1] == 1.0


def test_a_call_that_raised_is_recorded_and_raises_again(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a fault in the field")

    world, recorder = recorded_world(tmp_path)
    request = Request(id=1, arrival_s=0.0, prompt_tokens=5, max_tokens=4, slo=Slo())
    with monkeypatch.context() as patch:
        patch.setattr("throttllem.core.clocks.steady_load.LoadEstimator.arrived", broken)
        with pytest.raises(ZeroDivisionError):
            world.controller.handle(Arrived(request=request), 0.0)
        recorder.record([(0.0, Arrived(request=request), None)])
        recorder.close()
        (path,) = tmp_path.glob("*.jsonl")
        assert replay(path).first_difference is None
    found = replay(path).first_difference
    assert (found.line, found.recorded, found.ours) == (2, None, [])


# ---- differences ----------------------------------------------------------------------------------------------------


def test_a_command_that_was_changed_is_found(tmp_path):
    _, (path,) = flown(tmp_path)
    number = first_line(path, is_dispatch)
    edit(path, number, lambda line: line["c"][0].update(request_id=99))
    found = replay(path).first_difference
    assert found.line == number
    assert found.event["k"] == "Arrived"
    assert found.recorded[0] == {"k": "Dispatch", "engine": 0, "request_id": 99}
    assert found.ours[0] == {"k": "Dispatch", "engine": 0, "request_id": 0}
    assert found.error is None


def test_a_command_that_is_gone_is_found(tmp_path):
    _, (path,) = flown(tmp_path)
    number = first_line(path, is_dispatch)
    edit(path, number, lambda line: line.pop("c") and line)
    assert replay(path).first_difference.line == number


def test_an_event_that_is_gone_is_found_when_it_matters(tmp_path):
    _, (path,) = flown(tmp_path)
    number = first_line(path, is_dispatch)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: number - 1] + lines[number:]))
    assert replay(path).first_difference.line >= number


def test_an_error_of_this_build_is_a_difference(tmp_path, monkeypatch):
    _, (path,) = flown(tmp_path)
    number = first_line(path, is_dispatch)

    def broken(*_, **__):
        raise ZeroDivisionError("of this build")

    monkeypatch.setattr("throttllem.core.clocks.steady_load.LoadEstimator.arrived", broken)
    found = replay(path).first_difference
    assert (found.line, found.ours, found.error) == (number, None, "ZeroDivisionError: of this build")


def test_another_build_is_reported_and_replayed(tmp_path):
    _, (path,) = flown(tmp_path)
    edit(path, 1, lambda line: line.update(build="0.0.1+core.000000000000", made_with={"numpy": "1.0"}))
    result = replay(path)
    assert not result.build_matches
    assert result.first_difference is None
    assert "recorded by build 0.0.1+core.000000000000" in result.doubts[0]
    assert "recorded with numpy 1.0" in result.doubts[1]


# ---- damaged ---------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_off_replays_to_its_last_whole_line(tmp_path):
    _, (path,) = flown(tmp_path)
    whole, text = replay(path), path.read_bytes()
    path.write_bytes(text[:-3])
    cut = replay(path)
    assert cut.cut_off and not whole.cut_off
    assert cut.first_difference is None
    assert 0 < sum(cut.events.values()) < sum(whole.events.values())


def test_a_file_cut_off_anywhere_is_cut_off_or_no_record(tmp_path):
    _, (path,) = flown(tmp_path, rounds=40)
    text = path.read_bytes()
    header = text.index(b"\n")
    for end in (1, header // 2, header, header + 1, header + 2, (header + len(text)) // 2):
        path.write_bytes(text[:end])
        if end <= header:
            with pytest.raises(ReplayError, match=":1: "):
                replay(path)
        else:
            assert replay(path).cut_off == (text[end - 1 : end] != b"\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"hello\nworld\n", ":1: is not JSON"),
        (b"\x93NUMPY\x01\x00v\xff\xfe\n", ":1: is not JSON"),
        (b"[" * 100_000 + b"\n", ":1: is not JSON"),
        (b'{"a": 1}\n', ":1: is no header of a flight record"),
        (b"[1, 2]\n", ":1: is no header of a flight record"),
        (b'{"schema": 0}\n', ":1: recorded with schema 0, this build replays schema 2 only"),
        (
            b'{"schema": 1, "build": "0.9+core.x"}\n',
            ":1: recorded with schema 1, .* replay it with the build that recorded it .'0.9.core.x'.",
        ),
        (b'{"schema": 2, "build": "x", "model": "m"}\n', ":1: the header has no policy"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    path = tmp_path / "some.jsonl"
    path.write_bytes(text)
    with pytest.raises(ReplayError, match=f"some.jsonl:?.*{message}"):
        replay(path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(ReplayError, match=r"none.jsonl: cannot be read: No such file"):
        replay(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", ":3: is not JSON"),
        ("[]", ":3: is neither an event"),
        ('{"t": 1.0}', ":3: is neither an event"),
        ('{"t": "now", "e": {"k": "Timer"}}', ":3: is neither an event"),
        ('{"t": 1.0, "e": {"k": "Timer"}, "x": 1}', ":3: is neither an event"),
        ('{"t": 1.0, "e": {"k": "Lunch"}}', ":3: event: 'Lunch' is none that this build knows"),
        ('{"t": 1.0, "e": {"k": "Timer"}, "c": 5}', ":3: c: is no list of commands"),
        ('{"r": 0, "i": 0, "q": ["x"]}', ":3: q: 'x' is neither a time nor an observation"),
        ('{"r": 0, "i": 0, "q": [[1.0, 2]]}', ":3: q: .* is neither"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    _, recorder = recorded_world(tmp_path)
    for now_s in (0.0, 1.0, 2.0):
        recorder.record([(now_s, Timer(), [])])
    recorder.close()
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(ReplayError, match=message):
        replay(path)


def test_a_table_that_is_missing_or_another_is_reported(tmp_path):
    _, (path,) = flown(tmp_path)
    tables = sorted(tmp_path.glob("table-*.npz"))
    tables[0].write_bytes(tables[1].read_bytes())
    with pytest.raises(ReplayError, match=r"is not the table that .* was recorded with"):
        replay(path)
    for kept in tables:
        kept.unlink()
    with pytest.raises(ReplayError, match=r"no such file; a flight record needs the tables"):
        replay(path)


def test_a_state_that_is_damaged_is_refused(tmp_path):
    _, (path,) = flown(tmp_path)
    edit(path, 1, lambda line: line["state"].update(serving=[77]))
    with pytest.raises(ReplayError, match=r":1: the checkpoint is damaged, or of another build: KeyError.77.$"):
        replay(path)
    edit(path, 1, lambda line: line.update(predictor={"k": "exec"}, build="other"))
    with pytest.raises(ReplayError, match=r":1: .*'exec' is no predictor .*recorded by build 'other'"):
        replay(path)
    edit(path, 1, lambda line: line.update(state=[]))
    with pytest.raises(ReplayError, match=":1: the header has no state"):
        replay(path)


def test_a_table_that_an_engine_still_uses_is_kept_too(tmp_path):
    """Tables may be exchanged while an engine runs with the old one."""
    tables = {1: table(SPECS[1])}
    world, recorder = recorded_world(tmp_path, replace(OPTIONS, tables=tables, autoscale=None), file_bytes=2_000)
    world.ready(0, SPECS[1])
    slower = tables[1]
    tables[1] = replace_seconds(slower)
    for number in range(60):
        request = Request(id=number, arrival_s=world.now_s, prompt_tokens=5, max_tokens=4, slo=Slo(), output_tokens=4)
        world.requests[number] = request
        world.waiting.append(number)
        world.send(Arrived(request=request))
        world.advance(0.1)
        if world.up[0].in_progress:
            world.end_iteration(0)
    recorder.close()
    files = sorted(tmp_path.glob("*.jsonl"))
    header = json.loads(files[-1].read_text().splitlines()[0])
    assert len(set(header["tables"].values())) == 2
    assert replay(files[-1]).first_difference is None


def replace_seconds(one):
    names = ("clocks_mhz", "batch_bin", "kv_bin", "prefill_bin", "watts", "hull")
    return type(one)(seconds=one.seconds * 2, **{name: getattr(one, name) for name in names})


def test_an_event_that_hangs_the_core_is_an_error_that_names_its_line(tmp_path, monkeypatch):
    _, (path,) = flown(tmp_path)

    def hang(self, event, now_s):
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # the core's own handlers do not keep it from ending
                continue

    monkeypatch.setattr(replay_module, "LONGEST_S", 0.05)
    monkeypatch.setattr(Controller, "handle", hang)
    with pytest.raises(ReplayError, match=r"jsonl:2: takes the core more than 0.05 s"):
        replay(path)


@pytest.mark.parametrize("at", ["NaN", "Infinity", "-1e308", "1e999"])
def test_a_time_that_is_none_is_refused(tmp_path, at):
    _, (path,) = flown(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], f'{{"t":{at},"e":{{"k":"Timer"}}}}\n', *lines[5:]]))
    with pytest.raises(ReplayError, match=r"jsonl:6: t: .* is no time after"):
        replay(path)
