"""The flight recorder: what is written, how files follow each other, and that a failure never stops serving."""

import json
import os
import re
import stat
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
from core.world import World
from hypothesis import given
from hypothesis import strategies as st

from gateway.flight.flights import OPTIONS, SPECS, TABLES, busy, recorded_world, recorder_of
from gateway.flight.test_wire import commands, events
from throttllem.core.controller import Controller
from throttllem.core.types import EngineReady, Observed, Reason, Reject, Stepped, Timer
from throttllem.gateway.flight import wire
from throttllem.gateway.flight.checkpoint import table_digest
from throttllem.gateway.flight.recordings import Recordings, build, safe_name
from throttllem.gateway.flight.replay import calls, replay

times = st.floats(0, 1e9)
quiet = st.builds(Stepped, engine=st.integers(0, 1), iteration=st.integers(0, 4)) | st.builds(
    Observed, engine=st.integers(0, 1), running=st.integers(0, 9), waiting=st.integers(0, 9), kv_blocks=st.none()
)
made_up = st.tuples(times, quiet | quiet | events, st.just([]) | st.lists(commands, max_size=2) | st.none())


def files(folder):
    return sorted(folder.glob("*.jsonl"))


def lines(path):
    """Every line but the header."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def recorded(path):
    return [call for number, line in enumerate(lines(path), start=2) for call in calls(number, line)]


@given(st.lists(st.one_of(made_up, st.just(None)), max_size=30))
def test_whatever_is_recorded_can_be_read(tmp_path_factory, sequence):
    """Packed or not, in order; None: a flush between."""
    recorder = recorder_of(tmp_path_factory.mktemp("records"), Controller(OPTIONS))
    recorder.start()
    path = recorder.path
    for item in sequence:
        recorder.flush() if item is None else recorder.record([item])
    recorder.close()
    assert recorder.messages == []
    given_in = [item for item in sequence if item is not None]
    for call, (now_s, event, wanted) in zip(recorded(path), given_in, strict=True):
        assert (repr(call.at_s), call.event) == (repr(now_s), event)
        assert call.commands == (None if wanted is None else [wire.to_json(command) for command in wanted])


def test_bare_steps_and_observations_share_a_line(tmp_path):
    recorder = recorder_of(tmp_path, Controller(OPTIONS))
    recorder.start()
    recorder.record([(0.5, Observed(engine=0, running=1, waiting=0, kv_blocks=7), [])])
    for iteration in range(5, 8):
        recorder.record([(iteration / 8, Stepped(engine=0, iteration=iteration), [])])
    recorder.record([(1.0, Observed(engine=0, running=1, waiting=2), [])])
    recorder.record([(1.5, Stepped(engine=0, iteration=9), [])])
    recorder.record([(1.5, Stepped(engine=1, iteration=10), [])])
    recorder.record([(2.0, Stepped(engine=1, iteration=11, started=(3,)), [])])
    recorder.flush()
    assert lines(recorder.path) == [
        {"r": 0, "i": 5, "q": [[0.5, 1, 0, 7], 0.625, 0.75, 0.875, [1.0, 1, 2, None]]},
        {"r": 0, "i": 9, "q": [1.5]},
        {"r": 1, "i": 10, "q": [1.5]},
        {"t": 2.0, "e": {"k": "Stepped", "engine": 1, "iteration": 11, "started": [3]}},
    ]
    recorder.close()


def test_a_busy_hour_is_small(tmp_path):
    recorder = recorder_of(tmp_path, Controller(OPTIONS), file_bytes=1 << 30)
    recorder.start()
    path = recorder.path
    begun = path.stat().st_size
    for iteration in range(10_000):
        recorder.record([(iteration * 0.0123, Stepped(engine=0, iteration=iteration), [])])
    recorder.close()
    assert (path.stat().st_size - begun) / 10_000 < 22


def test_nothing_is_written_before_a_flush_and_the_buffer_is_bounded(tmp_path):
    recorder = recorder_of(tmp_path, Controller(OPTIONS))
    recorder.start()
    empty = recorder.path.stat().st_size
    recorder.record([(0.0, Timer(), [])])
    assert recorder.path.stat().st_size == empty
    recorder.flush()
    assert recorder.path.stat().st_size > empty
    before = recorder.path.stat().st_size
    for number in range(3000):
        recorder.record([(float(number), Timer(), [])])
    assert recorder.path.stat().st_size >= before + 64 * 1024
    recorder.close()


def test_the_header(tmp_path):
    _, recorder = recorded_world(tmp_path)
    header = json.loads(recorder.path.read_text())
    recorder.close()
    assert header["schema"] == 2
    assert (header["build"], header["model"], header["policy"]) == (build(), "toy/model", "least-energy")
    assert re.fullmatch(r".+\+core\.[0-9a-f]{12}", header["build"])
    assert header["tables"] == {str(tp): table_digest(table) for tp, table in TABLES.items()}
    assert header["options"]["throttle"]["policy"] == "least-energy"
    assert header["options"]["admission"]["queue_limit"] == 6
    assert header["options"]["specs"]["4"]["kv_blocks"] == 40
    assert len(list(tmp_path.glob("table-*.npz"))) == len(TABLES)
    assert re.fullmatch(r"toy_model-[0-9a-f]{8}-\d{8}T\d{6}Z-0001\.jsonl", files(tmp_path)[0].name)


def test_only_the_owner_may_read_it(tmp_path):
    _, recorder = recorded_world(tmp_path)
    recorder.close()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


# ---- rotation ------------------------------------------------------------------------------------------------


def test_files_are_bounded_in_size_and_number(tmp_path):
    world, recorder = recorded_world(tmp_path, file_bytes=80_000, files=3)
    busy(world, 2000)
    recorder.close()
    found = files(tmp_path)
    assert len(found) == 3
    numbers = [int(path.stem[-4:]) for path in found]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert numbers[0] > 2
    sizes = [path.stat().st_size for path in found[:-1]]
    assert all(75_000 < size < 82_000 for size in sizes), sizes


def test_a_checkpoint_larger_than_a_file_does_not_make_a_file_of_every_event(tmp_path):
    world, recorder = recorded_world(tmp_path, file_bytes=2_000, files=1000)
    busy(world, 300)
    recorder.close()
    assert 2 < len(files(tmp_path)) < len(world.log) / 4


def test_older_starts_count_and_other_models_are_left_alone(tmp_path):
    old = [tmp_path / f"m-2020010{day}T000000Z-0001.jsonl" for day in range(1, 6)]
    other = [tmp_path / name for name in ("m-2-20200101T000000Z-0001.jsonl", "m.jsonl", "notes.txt", "xm-1.jsonl")]
    for path in old + other:
        path.write_text("{}\n")
    recorder = recorder_of(tmp_path, Controller(OPTIONS), model="m", files=3)
    recorder.start()
    recorder.close()
    assert [path.exists() for path in old] == [False, False, False, True, True]
    assert all(path.exists() for path in other)


def test_a_clock_that_was_set_back_does_not_remove_the_file_in_use(tmp_path):
    for day in range(1, 4):
        (tmp_path / f"m-2999010{day}T000000Z-0001.jsonl").write_text("{}\n")
    recorder = recorder_of(tmp_path, Controller(OPTIONS), model="m", files=2)
    recorder.start()
    assert recorder.path.exists()
    recorder.close()
    assert len(files(tmp_path)) == 2


def test_tables_go_with_the_last_file_that_names_them(tmp_path):
    first = recorder_of(tmp_path, Controller(OPTIONS), model="m", files=2)
    first.start()
    first.close()
    fewer = replace(OPTIONS, tables={1: TABLES[1]})
    for _ in range(2):
        again = recorder_of(tmp_path, Controller(fewer), model="m", files=2)
        again.start()
        again.close()
    assert [path.name for path in tmp_path.glob("table-*.npz")] == [f"table-{table_digest(TABLES[1])}.npz"]


def test_two_starts_in_one_second_do_not_share_a_file(tmp_path):
    paths = set()
    for _ in range(3):
        recorder = recorder_of(tmp_path, Controller(OPTIONS))
        recorder.start()
        paths.add(recorder.path)
        recorder.close()
    assert len(paths) == 3 == len(files(tmp_path))


@pytest.mark.parametrize(
    "model", ["meta-llama/Llama-3", "../../etc/passwd", "", ".hidden", "ein Modell", "ü", "a" * 300]
)
def test_any_model_has_a_file_name(tmp_path, model):
    path = Recordings(tmp_path, model, 2).next_path()
    assert path.parent == tmp_path
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{,120}", path.name)
    assert safe_name(model) != safe_name(model + "!")


# ---- trouble -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_stops_recording_once_and_it_begins_again(tmp_path):
    world, recorder = recorded_world(tmp_path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorder._handle)
    os.close(full)
    busy(world, 20)
    recorder.flush()
    assert len(recorder.messages) == 1
    assert "No space left on device" in recorder.messages[0]
    assert recorder.path is None
    recorder.flush()
    world.send(Timer())
    world.advance(59.0)
    world.send(Timer())
    assert len(recorder.messages) == 1
    world.advance(2.0)
    world.send(Timer())
    assert "records again" in recorder.messages[1]
    before = len(world.log)
    busy(world, 50)
    path = recorder.path
    recorder.close()
    assert sum(replay(path).events.values()) >= len(world.log) - before > 50
    assert replay(path).first_difference is None


def test_a_folder_that_vanished_is_noticed_and_made_again(tmp_path):
    folder = tmp_path / "records"
    world, recorder = recorded_world(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    world.send(Timer())
    recorder.flush()
    assert len(recorder.messages) == 1
    assert "was removed" in recorder.messages[0]
    for _ in range(2):
        world.advance(61.0)
        world.send(Timer())
    world.ready(0, SPECS[1])
    path = recorder.path
    recorder.close()
    assert path.parent == folder
    assert replay(path).events == {"EngineReady": 1, "Timer": 1}
    assert len(recorder.messages) == 2


def test_a_folder_that_cannot_be_made_is_reported_once(tmp_path):
    (tmp_path / "file").write_text("")
    world, recorder = recorded_world(tmp_path / "file" / "records")
    assert len(recorder.messages) == 1
    for _ in range(5):
        world.advance(61.0)
        world.send(Timer())
    recorder.flush()
    recorder.close()
    assert len(recorder.messages) == 1


def test_what_cannot_be_written_does_not_raise(tmp_path):
    def failing(message):
        messages.append(message)
        raise RuntimeError("the log failed")

    messages = []
    recorder = recorder_of(tmp_path, Controller(OPTIONS), say=failing)
    recorder.start()
    recorder.record([(0.0, EngineReady(engine=0, spec=replace(SPECS[1], gpu=object())), [])])
    assert len(messages) == 1
    assert "object is nothing that JSON holds" in messages[0]


def test_after_close_nothing_is_opened(tmp_path):
    recorder = recorder_of(tmp_path, Controller(OPTIONS))
    recorder.start()
    recorder.close()
    for now_s in (0.0, 100.0, 200.0):
        recorder.record([(now_s, Timer(), [Reject(request_id=1, why=Reason.FITS)])])
    recorder.flush()
    recorder.close()
    assert len(files(tmp_path)) == 1
    assert recorder.messages == []


def test_a_world_that_is_recorded_does_the_same(tmp_path):
    world, recorder = recorded_world(tmp_path)
    alone = World(OPTIONS)
    busy(world, 100)
    busy(alone, 100)
    recorder.close()
    assert world.log == alone.log


# ---- the next file is opened in the background ----------------------------------------------------------------


class Later(Executor):
    """Runs what was submitted when `work` is called."""

    def __init__(self):
        self.submitted = []

    def submit(self, action, /, *given):
        future = Future()
        self.submitted.append((future, action, given))
        return future

    def work(self):
        while self.submitted:
            future, action, given = self.submitted.pop(0)
            try:
                future.set_result(action(*given))
            except OSError as error:
                future.set_exception(error)


def beside(folder, **changes):
    world, recorder = recorded_world(folder, **changes)
    later = Later()
    recorder.start(later)
    return world, recorder, later


def test_while_the_next_file_is_opened_lines_wait_in_memory_and_none_is_lost(tmp_path):
    world, recorder, later = beside(tmp_path, file_bytes=20_000, files=1000)
    while not later.submitted:
        busy(world, 20)
    recorder.flush()
    assert (recorder.path, recorder.messages) == (None, [])
    busy(world, 20)
    first = files(tmp_path)
    later.work()
    busy(world, 20)
    recorder.flush()
    assert recorder.path is not None
    recorder.close()
    assert recorder.messages == []
    # The recorder was started twice: the first file is empty.
    assert len(files(tmp_path)) == len(first) + 1
    assert sum(sum(replay(path).events.values()) for path in files(tmp_path)) == len(world.log)
    assert all(replay(path).first_difference is None for path in files(tmp_path))


def test_a_next_file_that_does_not_come_is_reported_and_memory_stays_bounded(tmp_path):
    world, recorder, later = beside(tmp_path, file_bytes=20_000)
    while not recorder.messages:
        busy(world, 20)
    assert "could not be opened in time" in recorder.messages[0]
    assert not recorder._lines
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    later.work()  # it comes after all, but is not wanted any more
    recorder.flush()
    assert recorder.path is None
    assert before is None or len(list(Path("/proc/self/fd").iterdir())) == before
    recorder.close()


def test_a_next_file_that_cannot_be_opened_is_reported(tmp_path):
    folder = tmp_path / "records"
    world, recorder, later = beside(folder, file_bytes=20_000)
    while not later.submitted:
        busy(world, 20)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    later.work()
    busy(world, 5)
    assert len(recorder.messages) == 1
    recorder.close()


def test_a_real_executor(tmp_path):
    world, recorder = recorded_world(tmp_path, file_bytes=80_000, files=1000)
    with ThreadPoolExecutor(max_workers=1) as executor:
        recorder._aside = executor
        for _ in range(20):
            busy(world, 100)
            wait([recorder._opening] if recorder._opening else [])  # a slow machine is not what is tested
        recorder.close()
    assert recorder.messages == []
    assert len(files(tmp_path)) > 2
    assert sum(sum(replay(path).events.values()) for path in files(tmp_path)) == len(world.log)
