"""The flight recorder opens its next file beside the serving: nothing is lost, and memory stays bounded."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from gateway.flights import busy, recorded_world
from throttllem.gateway.flight.replay import replay


def files(folder):
    return sorted(folder.glob("*.jsonl"))


class Later(Executor):
    """Runs what was submitted when `work` is called."""

    def __init__(self):
        self.due = []

    def submit(self, action, /, *given):
        future = Future()
        self.due.append((future, action, given))
        return future

    def work(self):
        while self.due:
            future, action, given = self.due.pop(0)
            try:
                future.set_result(action(*given))
            except OSError as error:
                future.set_exception(error)


def beside(folder, **changes):
    world, recorder = recorded_world(folder, **changes)
    later = Later()
    recorder.start(later)
    return world, recorder, later


def test_while_the_next_file_is_opened_everything_waits_in_memory_and_nothing_is_lost(tmp_path):
    world, recorder, later = beside(tmp_path, file_bytes=20_000, files=1000)
    while not later.due:
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


def test_a_next_file_that_does_not_come_is_logged_and_memory_stays_bounded(tmp_path):
    world, recorder, later = beside(tmp_path, file_bytes=20_000)
    while not recorder.messages:
        busy(world, 20)
    assert "could not be opened in time" in recorder.messages[0]
    assert not recorder._lines
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    later.work()  # it comes too late
    recorder.flush()
    assert recorder.path is None
    assert before is None or len(list(Path("/proc/self/fd").iterdir())) == before
    recorder.close()


def test_a_next_file_that_cannot_be_opened_is_logged(tmp_path):
    folder = tmp_path / "records"
    world, recorder, later = beside(folder, file_bytes=20_000)
    while not later.due:
        busy(world, 20)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    later.work()
    busy(world, 5)
    assert len(recorder.messages) == 1
    recorder.close()


def test_a_real_executor(tmp_path):
    world, recorder = recorded_world(tmp_path, file_bytes=20_000, files=1000)
    with ThreadPoolExecutor(max_workers=1) as executor:
        recorder._aside = executor
        busy(world, 1000)
        recorder.close()
    assert recorder.messages == []
    assert len(files(tmp_path)) > 2
    assert sum(sum(replay(path).events.values()) for path in files(tmp_path)) == len(world.log)
