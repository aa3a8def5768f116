"""Every finding: real keepers, a fake NVML, the doctor in its own process."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from tests.keeper.rig import NOBODY, is_root, needs_root, until
from throttllem.doctor.rights import sets_clocks, this_user
from tools.nvml.machine import Machine, a100


@pytest.fixture
def findings(ward, machine):
    """The doctor's exit code and its findings as "mark subject: text"."""

    def run(*options, uid=None, measure=False):
        code, output = ward.doctor("--json", *([] if measure else ["--no-measure"]), *options, machine=machine, uid=uid)
        report = json.loads(output)
        assert report["schema"] == 1
        assert all(one["remedy"] for one in report["findings"] if one["mark"] == "!!"), "each has its remedy"
        assert code == any(one["mark"] == "!!" for one in report["findings"])
        return [f"{one['mark']} {one['subject']}: {one['text']}" for one in report["findings"]], report

    return run


def test_a_machine_without_faults(findings, keeper):
    report, _ = findings()
    assert report[0] == "ok driver: NVIDIA 580.95.05, NVML 13.580.95.05"
    assert report[1].startswith(
        f"ok GPU 0: {keeper.uuids[0]}, NVIDIA A100-SXM4-40GB: 81 clocks from 210 to 1410 MHz, now "
    )
    assert report[2:5] == [
        "ok GPU 0: its kind is a100-40gb-sxm: seconds calibrated, watts calibrated",
        "ok GPU 0: energy counter",
        "ok GPU 0: no sign of a lock (NVML does not report locks; one that limits no clock now has no sign)",
    ]
    assert f"ok keeper: runs, and /run/throttllem/keeper.sock answers {this_user()}" in report
    assert sum(line.startswith("ok rights: the keeper sets GPU") for line in report) == 2
    if is_root:
        assert not [line for line in report if line.startswith("!!")]


def test_it_sets_nothing(findings, machine, keepers):
    keepers()
    findings(measure=True)
    assert machine.writes() == []
    assert [gpu.attempted for gpu in machine.gpus] == [0, 0]


def test_leases(findings, keeper):
    with keeper.holds(0, mhz=900), keeper.holds(1):
        report, everything = findings()
    holder = f"for process {os.getpid()} of user {os.geteuid()}"
    assert f"ok GPU 0: locked to 900 MHz by the keeper, {holder}" in report
    assert f"ok GPU 1: leased, not set yet, by the keeper, {holder}" in report
    assert everything["keeper"]["held"][keeper.uuids[0]]["mhz"] == 900


def test_a_gpu_that_is_still_being_restored(findings, keeper, machine):
    with keeper.holds(0, mhz=900):
        machine.gpus[0].permission(False)
    until(lambda: keeper.status()["returning"])
    report, _ = findings()
    assert "!! GPU 0: still being restored by the keeper: the driver refuses, or hangs" in report
    machine.gpus[0].permission(True)


def test_gpus_that_a_dead_keeper_left_locked(findings, keepers, machine):
    keeper = keepers(baselines={1: (705, 705)})
    with keeper.holds(mhz=900):
        keeper.kill()
    report, everything = findings()
    uuids = keeper.uuids
    assert f"!! GPU 0: locked by a keeper that is gone; {uuids[0]} is to be unlocked" in report
    goal = "restored to its baseline, 705 to 705 MHz"
    assert f"!! GPU 1: locked by a keeper that is gone; {uuids[1]} is to be {goal}" in report
    assert not [line for line in report if "another program" in line]
    assert f"-- keeper: none runs: {everything['keeper']['socket']} has no process behind it" in report
    assert everything["keeper"]["left"] == {uuids[0]: None, uuids[1]: [705, 705]}


def test_a_steady_clock_is_a_hint_and_no_fault(findings, keeper, machine):
    machine.gpus[1].lock_by_other(705, 705)
    report, everything = findings()
    hint = "another program's lock, or the boost clock of a busy GPU"
    assert f"-- GPU 1: steady at 705 of 1410 MHz: {hint}" in report
    (remedy,) = (one["remedy"] for one in everything["findings"] if "another program" in one["text"])
    assert "nvidia-smi -i 1 -rgc" in remedy
    assert everything["gpus"][1]["steady_mhz"] == 705


def test_a_lock_within_the_baseline(findings, keepers, machine):
    keepers(baselines={1: (600, 900)})
    machine.gpus[1].lock_by_other(705, 705)
    assert "ok GPU 1: steady at 705 MHz, within its baseline (the keeper's --normally)" in findings()[0]


@needs_root
def test_a_keeper_that_does_not_accept_the_user(findings, keeper):
    with keeper.holds(0, mhz=900):
        report, _ = findings(uid=NOBODY)
    assert [line for line in report if line.startswith("!! keeper: runs; ") and f"not accept user {NOBODY}" in line]
    assert "-- GPU 0: locked at 900 MHz by the keeper, according to its journal" in report
    assert [line for line in report if line.startswith("!! rights: ") and "and there is no keeper" in line]


@needs_root
def test_a_keeper_that_accepts_the_user(findings, keepers):
    keepers(users=[NOBODY], clocks=[(600, 1200)])
    report, _ = findings(uid=NOBODY)
    (found,) = [line for line in report if "from 600 to 1200 MHz of 1410" in line]
    assert found.startswith("-- rights: the keeper sets GPU 0 for user")
    assert "-- rights: the keeper does not set GPU 1" in report
    assert not [line for line in report if line.startswith("!!")]


def test_a_range_without_a_clock_of_the_gpu(findings, keepers):
    keepers(clocks=[(100, 200)])
    report, _ = findings()
    (found,) = [line for line in report if "from 100 to 200 MHz" in line]
    assert found.startswith("!! rights: the keeper sets GPU 0")
    assert found.endswith("and it has no clock there")


@needs_root
def test_folders_that_cannot_be_entered(findings, keeper):
    for folder in (keeper.run, keeper.state):
        folder.chmod(0o700)
    report, _ = findings(uid=NOBODY)
    assert [line for line in report if line.startswith("!! keeper: ") and "may not enter its folder" in line]
    assert [line for line in report if line.startswith("-- journal: the keeper's journal cannot be read")]


@pytest.mark.slow
def test_a_keeper_that_does_not_answer(findings, keeper):
    keeper.signal(19)  # SIGSTOP
    report, _ = findings()
    assert [line for line in report if line.startswith("!! keeper: ") and line.endswith("does not answer")]
    assert not [line for line in report if "a keeper that is gone" in line]


@pytest.mark.slow
def test_a_socket_with_the_wrong_mode(findings, keeper):
    keeper.socket.chmod(0o600)
    until(lambda: keeper.socket.stat().st_mode & 0o777 in (0o600, 0o666))
    keeper.signal(19)
    keeper.socket.chmod(0o600)
    assert [line for line in findings()[0] if "has mode 0600" in line]


def test_a_folder_that_every_user_can_write_to(findings, keeper):
    keeper.run.chmod(0o777)
    assert [line for line in findings()[0] if line.startswith("-- keeper: other users than root can write in")]


def test_a_torn_journal(findings, keeper):
    keeper.holds(0, mhz=900).ok("release")
    keeper.copies[0].write_bytes(b"0000 x")
    (line,) = (line for line in findings()[0] if line.startswith("-- journal: "))
    assert "is not used" in line


def test_a_gpu_that_is_allowed_and_not_here(findings, keeper, machine, keepers):
    keeper.stop()
    made = keepers(wait=False, clocks=[(210, 1410)])
    made.kill()
    pid = made._processes.start(
        "keep", made.log, made.environment, arguments=[*made.arguments, "--gpu", "GPU-gone=1-2"]
    )
    until(made.listens)
    assert "!! keeper: may set GPU-gone, which is not here" in findings()[0]
    os.kill(pid, 9)
    made._processes.wait(pid)


def test_shared_gpus(findings, machine):
    machine.gpus[0].mig(True)
    machine.gpus[1].mps([4711])
    report, everything = findings()
    assert [line for line in report if line.startswith("!! GPU 0: its clock is not to be set: MIG is on")]
    assert [line for line in report if line.startswith("!! GPU 1: its clock is not to be set: MPS")]
    assert [gpu["shared"] for gpu in everything["gpus"]] == ["MIG", "MPS"]


def test_processes_on_a_gpu(findings, machine):
    engine = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "vllm", "serve", "--api-key=secret"]
    )
    try:
        machine.gpus[0].processes([engine.pid, os.getpid(), 2**22 + 5])
        report, everything = findings()
    finally:
        engine.kill()
        engine.wait()
    (line,) = (line for line in report if "computing on it" in line)
    assert f"process {engine.pid} (python" in line
    assert "an engine: vllm)" in line
    assert f"process {2**22 + 5} (of another container)" in line
    assert "secret" not in json.dumps(everything)


def test_a_lost_gpu_hides_no_other(findings, machine):
    machine.gpus[0].lost(True)
    report, everything = findings()
    assert [line for line in report if line.startswith("!! GPU 0: ") and "lost" in line.lower()]
    assert [line for line in report if line.startswith("ok GPU 1: energy counter")]
    assert [gpu["number"] for gpu in everything["gpus"]] == [1]


def test_throttle_reasons(findings, machine):
    machine.gpus[0].work(1.0, 30)
    machine.gpus[0].limit_w(150)
    machine.gpus[1].work(1.0, 30)
    machine.gpus[1].thermal(900)
    time.sleep(0.05)
    report, _ = findings()
    assert "-- GPU 0: slowed down by power cap" in report
    assert "!! GPU 1: slowed down by thermal" in report
    assert not [line for line in report if "another program" in line], "a throttled clock is no hint at a lock"


def test_energy_counters(findings, machine):
    machine.gpus[1].energy_counter(False)
    report, everything = findings(measure=True)
    assert [line for line in report if line.startswith("ok GPU 0: energy counter, refreshed every ")]
    assert [line for line in report if line.startswith("-- GPU 1: no energy counter")]
    assert 0.05 < everything["gpus"][0]["energy_refresh_s"] < 0.2
    assert everything["gpus"][1]["energy_refresh_s"] is None


def test_a_counter_that_contradicts_the_watts(findings, machine):
    machine.gpus[0].counter_of_module(200.0)
    machine.gpus[1].counter_stands(True)
    report, _ = findings(measure=True)
    assert any("GPU 0: its energy counter grows" in line and "covers more than the GPU" in line for line in report)
    assert "-- GPU 1: its energy counter stands still: power is integrated instead" in report


def test_an_unlisted_gpu_prints_its_entry(ward, library, folder):
    part = a100(1, name="NVIDIA A100-SXM-64GB", memory_bytes=64 * 2**30, cores=124 * 64, limit_w=500.0)
    with Machine.create(folder / "custom", part, library=library) as machine:
        _, output = ward.doctor(machine=machine)
        assert "-- GPU 0: NVIDIA A100-SXM-64GB (68.7 GB, up to 1410 MHz" in output and "modelled after" in output
        entry = textwrap.dedent(output[output.index("     [gpu.") :].split("limit_w = 500")[0] + "limit_w = 500")
        (folder / "mine.toml").write_text(entry)
        _, output = ward.doctor("--catalogue", str(folder / "mine.toml"), machine=machine)
    assert "ok GPU 0: its kind is a100-sxm-64gb-69gb: seconds modelled, watts modelled" in output


def test_an_old_driver_hides_no_gpu(findings, machine):
    for call in ("nvmlSystemGetNVMLVersion", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetMigMode"):
        machine.fault(call, error=13)
    machine.fault("nvmlDeviceGetEnforcedPowerLimit", error=3)
    report, everything = findings()
    assert len(everything["gpus"]) == 2 and everything["gpus"][0]["kind"] == "a100-40gb-sxm"
    assert report[0] == "-- driver: it does not report its version"


def test_a_gpu_without_clocks_that_can_be_set_is_shown(findings, keeper, machine):
    machine.fault("nvmlDeviceGetSupportedMemoryClocks", error=13, gpu=0)
    report, everything = findings()
    assert len(everything["gpus"]) == 2 and any(
        "GPU 0" in line and "no clocks that can be set" in line for line in report
    )


def test_a_library_that_does_not_fit_the_driver(findings, machine):
    machine.fault("nvmlInitWithFlags", error=18)
    _, everything = findings()
    fault = next(one for one in everything["findings"] if one["subject"] == "driver")
    assert "mismatch" in fault["text"] and "reboot" in fault["remedy"]


def test_zeusd(ward, machine, processes, folder, findings):
    assert not [line for line in findings()[0] if "zeusd" in line]
    path = folder / "zeusd.sock"
    with socket.socket(socket.AF_UNIX) as zeusd:
        zeusd.bind(str(path))
        environment = machine.environment() | {"ZEUSD_SOCK_PATH": str(path)}
        log = folder / "doctor.log"
        log.unlink()
        given = ["--socket", str(ward.socket), "--state", str(ward.state), "--no-measure"]
        processes.wait(processes.start("examine", log, environment, arguments=given))
    assert f"-- zeusd: there is one at {path}" in log.read_text()


def test_no_gpu_at_all(ward, processes):
    with processes.without_driver():
        code, output = ward.doctor()
    assert code == 1
    assert output.startswith("!! driver: no NVIDIA driver here: NVML Shared Library Not Found\n     load the driver")
    assert output.endswith("\n1 to correct\n")


def test_a_driver_that_is_not_loaded(findings, machine, keeper):
    machine.driver(loaded=False)
    report, _ = findings()
    assert report[0] == "!! driver: no NVIDIA driver here: Driver Not Loaded"
    assert not [line for line in report if "is not here" in line], "it is not known which GPUs are here"


@pytest.mark.skipif(not sets_clocks(), reason="needs the rights that NVML wants")
def test_nothing_to_mend(ward, machine, keeper):
    code, output = ward.doctor("--no-measure", machine=machine)
    assert (code, output.splitlines()[-1]) == (0, "nothing to correct")


@pytest.mark.slow
def test_a_gpu_whose_calls_hang_hides_no_other(findings, machine):
    machine.fault("nvmlDeviceGetPowerUsage", sleep_s=30, gpu=0)
    begun_s = time.monotonic()
    report, _ = findings()
    assert time.monotonic() - begun_s < 8
    assert "!! GPU 0: a call of the driver has not returned for 3 s" in report
    assert [line for line in report if line.startswith("ok GPU 1: energy counter")]


@pytest.mark.slow
def test_a_driver_that_hangs(findings, machine):
    machine.fault("nvmlInitWithFlags", sleep_s=30)
    report, _ = findings()
    assert report[0] == "!! driver: it hangs: a call of the driver has not returned for 3 s"
    assert [line for line in report if line.startswith("-- keeper: none runs")]
