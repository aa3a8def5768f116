"""Whether an engine runs on the GPUs that are named: processes, what cannot be seen, and activity."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gpu.test_hardware import hardware, until
from throttllem.gpu.boards.users import IDLE_S, Activity, Place, Process, judge, listener, placement, read_processes
from throttllem.gpu.device import Work
from throttllem.gpu.hardware import Mode
from throttllem.gpu.nvml import Nvml

URL = "http://127.0.0.1:8001"
SHELL, SERVER, CORE, WORKER, OTHER, SECOND, RANK0, RANK1 = 10, 20, 21, 22, 30, 40, 51, 52
PROCESSES = {
    SHELL: Process(parent=1, name="bash", command="bash"),
    SERVER: Process(parent=SHELL, name="vllm", command="python -m vllm serve model"),
    CORE: Process(parent=SERVER, name="VLLM::EngineCor", command="vllm::enginecore"),
    WORKER: Process(parent=CORE, name="VLLM::Worker_TP", command="vllm::worker_tp1"),
    OTHER: Process(parent=SHELL, name="python", command="python train.py"),
    SECOND: Process(parent=SHELL, name="vllm", command="python -m vllm serve other"),
    50: Process(parent=SHELL, name="mpirun", command="mpirun -n 2 tritonserver"),
    RANK0: Process(parent=50, name="tritonserver", command="tritonserver"),
    RANK1: Process(parent=50, name="tritonserver", command="tritonserver"),
}
HIDDEN = 4_000_000
"""The process id of another namespace."""


@pytest.mark.parametrize(
    ("named", "used", "listening", "place", "text"),
    [
        ([0], {0: (CORE,), 1: ()}, SERVER, Place.RIGHT, "computes on GPU 0"),
        ([0, 1], {0: (CORE,), 1: (WORKER,), 2: (OTHER,)}, SERVER, Place.RIGHT, "computes on GPUs 0, 1"),
        ([0, 1], {0: (RANK0,), 1: (RANK1,)}, RANK0, Place.RIGHT, "computes on GPUs 0, 1"),
        ([0], {0: (), 1: (CORE,)}, SERVER, Place.WRONG, "computes on GPU 1, which is not among its `gpus`, and not on"),
        ([0], {0: (SECOND,), 1: (CORE,)}, SERVER, Place.WRONG, "computes on GPU 1"),
        ([0], {0: (CORE,), 1: (WORKER,)}, SERVER, Place.WRONG, "computes on GPU 1, which is not among"),
        ([0], {0: (OTHER,)}, SERVER, Place.WRONG, "does not compute on GPU 0; process 30 (python) does"),
        ([0], {0: (SECOND,)}, SERVER, Place.UNKNOWN, "cannot be matched"),
        ([0], {0: (HIDDEN,)}, SERVER, Place.UNKNOWN, "another container?"),
        ([0], {0: ()}, SERVER, Place.UNKNOWN, "lists no process on GPU 0"),
        ([0], {0: None, 1: (CORE,)}, SERVER, Place.UNKNOWN, "does not list processes"),
        ([0], {0: (), 1: (HIDDEN,)}, None, Place.WRONG, "no process computes on GPU 0, and process 4000000 on GPU 1"),
        ([0], {0: (HIDDEN,), 1: ()}, None, Place.UNKNOWN, "cannot be seen"),
        ([0], {0: (), 1: ()}, None, Place.UNKNOWN, "cannot be checked"),
    ],
)
def test_processes_tell_where_the_engine_runs(named, used, listening, place, text):
    found = judge(named, used, PROCESSES, listening, URL)
    assert found.place is place and text in found.text
    assert ("CUDA_DEVICE_ORDER" in found.text) == (place is Place.WRONG)


@pytest.fixture
def engine():
    """A process that listens, and a child of it that computes: (url, pid, pid)."""
    code = (
        "import socket, subprocess, sys\n"
        "listening = socket.create_server(('127.0.0.1', 0))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE)\n"
        "print(listening.getsockname()[1], child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        port, child = map(int, process.stdout.readline().split())
        yield f"http://127.0.0.1:{port}", process.pid, child
        process.stdin.close()


def test_the_process_that_listens_is_found(engine):
    url, pid, child = engine
    assert listener(url) == pid
    assert read_processes(Path("/proc"))[child].parent == pid
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert listener(f"http://127.0.0.1:{unused.getsockname()[1]}") is None
    assert listener("http://192.0.2.1:80") is None


def test_on_a_machine_the_engine_is_found_on_its_gpu(machine, engine):
    url, _, child = engine
    machine.gpus[1].processes([child])
    with Nvml() as nvml:
        right = placement(nvml, [machine.gpus[1].uuid], url)
        wrong = placement(nvml, [machine.gpus[0].uuid], url)
        machine.gpus[1].processes([HIDDEN])
        unknown = placement(nvml, [machine.gpus[1].uuid], url)
        machine.fault("nvmlDeviceGetComputeRunningProcesses_v3", error=13)
        machine.fault("nvmlDeviceGetComputeRunningProcesses_v2", error=13)
        unlisted = placement(nvml, [machine.gpus[1].uuid], url)
    assert (right.place, wrong.place, unknown.place) == (Place.RIGHT, Place.WRONG, Place.UNKNOWN)
    assert "computes on GPU 1" in wrong.text and "does not list" in unlisted.text


def test_idle_gpus_of_a_working_engine_are_noticed():
    activity, seconds = Activity(2), round(IDLE_S) + 3
    for at_s in range(seconds):
        activity.saw(at_s, [True, False])
        activity.worked(at_s + 0.5, 0.5)
        assert activity.idle() is None
    for at_s in range(seconds, 2 * seconds):
        activity.saw(at_s, [True, False])
        activity.worked(at_s + 0.5, 0.5)
    assert activity.idle() == 1
    activity.saw(2 * seconds, [False, True])
    assert activity.idle() is None


def test_work_that_is_reported_when_it_is_over_is_no_idle_gpu():
    activity = Activity(1)
    activity.saw(100.0, [True])
    activity.saw(100.1, [False])
    activity.worked(100.2, 20.0)
    activity.worked(101.0, 0.8)
    assert activity.idle() is None


def test_without_utilization_nothing_is_concluded():
    activity = Activity(1)
    for at_s in range(60):
        activity.saw(at_s, [None])
        activity.worked(at_s + 0.5, 0.5)
    assert activity.idle() is None


def test_a_gpu_that_is_idle_while_the_engine_works_is_shown(machine, tmp_path, caplog):
    machine.gpus[0].work(0.0, 3600.0)

    async def run():
        async with hardware(SimpleNamespace(socket=tmp_path / "none"), Mode.OFF, names=("0",)) as gpu:
            gpu.worked(Work(seconds=IDLE_S, decode_sequences=1, kv_tokens=1, prefill_tokens=0, prefill_pairs=0.0))
            found = await until(lambda: gpu.read().misplaced)
            machine.gpus[0].work(0.5, 3600.0)
            await until(lambda: gpu.read().misplaced is None)
            return found

    found = asyncio.run(run())
    assert machine.gpus[0].uuid in found and "idle while the engine works" in found and found in caplog.text


def test_this_process_is_seen():
    assert read_processes(Path("/proc"))[os.getpid()].parent == os.getppid()
