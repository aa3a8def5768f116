"""`throttllem keeper`: what it becomes, who may run it, and the unit that it prints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import run

from throttllem.doctor import rights
from throttllem.gpu.keeper_client import SOCKET
from throttllem.keeper import unit as keeper_unit
from throttllem.keeper.__main__ import RESTORE_S
from throttllem.keeper.options import parse_options
from throttllem.keeper.unit import HOMES, STATE, unit_text, user_id

UUID = "GPU-cfbd6ca2-5f85-43b7-dcc7-dd4f6c1cf3df"
OTHER = "GPU-00000000-5f85-43b7-dcc7-dd4f6c1cf3df"
GPU = ("--gpu", f"{UUID}=600-1410")


class BecameError(Exception):
    """The command that the process would have become."""


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> None:
    def become(path: str, arguments: list[str]) -> None:
        raise BecameError(path, arguments)

    monkeypatch.setattr(os, "execv", become)


def unit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, list[str]]:
    """The printed unit: every value of every directive."""
    assert run(monkeypatch, "keeper", *(options or GPU), "--unit") == 0
    found: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


# ---- what it becomes --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("became")
def test_it_becomes_the_process_of_the_keeper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rights, "sets_clocks", lambda: True)
    socket, state = tmp_path / "new/run/keeper.sock", tmp_path / "state"
    options = ["--normally", f"{UUID}=600-1200", "--user", "root", "--user", "65534"]
    with pytest.raises(BecameError) as became:
        run(monkeypatch, "keeper", *GPU, *options, "--socket", str(socket), "--state", str(state))
    path, arguments = became.value.args
    assert path == sys.executable
    assert arguments[:4] == [sys.executable, "-I", "-m", "throttllem.keeper"]
    options = parse_options(arguments[4:])
    assert options.allowed == {UUID: (600, 1410)}
    assert options.baselines == {UUID: (600, 1200)}
    assert (options.uids, options.socket, options.state) == ({0, 65534}, socket, state)
    assert not socket.parent.exists(), "the keeper makes it, and checks it"


def test_the_defaults_are_the_keepers_own() -> None:
    options = parse_options(list(GPU))
    assert (options.socket, options.state) == (SOCKET, STATE)


def test_the_keeper_is_found_in_isolated_mode() -> None:
    done = subprocess.run(
        [sys.executable, *keeper_unit.PROGRAM, "--help"], capture_output=True, check=True, text=True, cwd="/"
    )
    assert "--normally" in done.stdout


def test_the_keeper_checks_its_options_itself() -> None:
    command = [sys.executable, *keeper_unit.PROGRAM, "--gpu", "GPU-1"]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (done.returncode, "--gpu" in done.stderr) == (2, True)


@pytest.mark.usefixtures("became")
def test_without_rights_it_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rights, "sets_clocks", lambda: False)
    assert run(monkeypatch, "keeper", *GPU) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the keeper sets clocks, which needs root")
    assert "--unit" in error
    assert run(monkeypatch, "keeper", *GPU, "--unit") == 0, "printing sets nothing"


def test_a_gpu_is_required(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "keeper") == 2
    assert "--gpu" in capsys.readouterr().err


def test_users_by_name_and_number() -> None:
    assert [user_id("root"), user_id("4711")] == ["0", "4711"]
    with pytest.raises(ValueError, match="--user nobody-at-all: there is no such user"):
        user_id("nobody-at-all")


# ---- the unit ---------------------------------------------------------------------------------------------------


def test_the_unit_starts_this_keeper(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = unit(monkeypatch, capsys, *GPU, "--user", "root", "--normally", f"{UUID}=600-1200")
    (command,) = found["ExecStart"]
    words = command.split()
    assert Path(words[0]).is_absolute()
    assert words[:4] == [sys.executable, "-I", "-m", "throttllem.keeper"]
    options = parse_options(words[4:])
    assert (options.allowed, options.baselines) == ({UUID: (600, 1410)}, {UUID: (600, 1200)})
    assert options.uids == {0}
    assert (options.socket, options.state) == (SOCKET, STATE)


WANTED = {
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "always",
    "RestartSec": "100ms",
    "StartLimitIntervalSec": "0",
    "WatchdogSec": "750ms",
    "RuntimeDirectory": "throttllem",
    "RuntimeDirectoryPreserve": "yes",
    "StateDirectory": "throttllem",
    "CapabilityBoundingSet": "CAP_SYS_ADMIN",
    "AmbientCapabilities": "",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "PrivateTmp": "yes",
    "PrivateNetwork": "yes",
    "PrivateMounts": "yes",
    "PrivateIPC": "yes",
    "RestrictAddressFamilies": "AF_UNIX",
    "IPAddressDeny": "any",
    "DevicePolicy": "closed",
    "SystemCallErrorNumber": "EPERM",
    "SystemCallArchitectures": "native",
    "MemoryDenyWriteExecute": "yes",
    "LockPersonality": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "ProtectClock": "yes",
    "ProtectControlGroups": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectProc": "invisible",
    "MemoryMax": "256M",
    "MemorySwapMax": "0",
    "TasksMax": "64",
    "LimitCORE": "0",
    "LimitNOFILE": "4096",
    "CPUWeight": "1000",
    "OOMScoreAdjust": "-900",
    "WantedBy": "multi-user.target",
}


def test_the_unit_is_hardened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = unit(monkeypatch, capsys)
    assert {name: found.get(name) for name in WANTED} == {name: [value] for name, value in WANTED.items()}
    assert found["SystemCallFilter"] == ["@system-service", "~@resources @privileged"]
    assert found["ProtectHome"][0] in ("yes", "read-only")
    assert found["DeviceAllow"][0] == "/dev/nvidiactl rw"
    assert all(re.fullmatch(r"(/dev/nvidiactl|char-nvidia[a-z-]*) rw", allowed) for allowed in found["DeviceAllow"])
    assert float(found["TimeoutStopSec"][0].removesuffix("s")) > RESTORE_S + 1
    assert not {"User", "PrivateDevices", "ProcSubset"} & found.keys(), "root, NVIDIA's devices, /proc/driver"


def test_homes_are_readable_only_if_the_program_is_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, home in ((Path("/opt/x/bin/python"), "yes"), (HOMES[0] / "me/x", "read-only")):
        monkeypatch.setattr(keeper_unit, "_program_paths", lambda path=path: (path,))
        assert f"ProtectHome={home}" in unit_text(["x"], SOCKET, STATE)


def test_folders_of_a_unit_are_made_by_systemd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--socket", "/run/site/gpus/k.sock", "--state", "/var/lib/site/gpus")
    found = unit(monkeypatch, capsys, *GPU, *places)
    assert (found["RuntimeDirectory"], found["StateDirectory"]) == (["site/gpus"], ["site/gpus"])


@pytest.mark.usefixtures("became")
@pytest.mark.parametrize("asked", [(), ("--unit",)], ids=["run", "unit"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "GPU-1"), "--gpu GPU-1: must be UUID=LOWEST-HIGHEST in MHz, as in GPU-...=600-1410"),
        (("--gpu", "GPU-1=1410-600"), "--gpu GPU-1=1410-600: must be"),
        (("--gpu", "0=600-1410"), "'0' is not the UUID of a GPU"),
        (("--gpu", "GPU-1=600-1410"), "'GPU-1' is not the UUID of a GPU (GPU-, then 8-4-4-4-12"),
        (("--gpu", f"{UUID.upper()}=600-1410"), "0-9 and a-f); `throttllem doctor` shows the UUIDs of this host"),
        (("--gpu", f"{UUID} =600-1410"), "is not the UUID of a GPU"),
        (
            (*GPU, "--gpu", f"{UUID}=300-900"),
            f"--gpu {UUID}=300-900: {UUID} has a range already; give each GPU one --gpu",
        ),
        ((*GPU, *("--normally", f"{UUID}=600-900") * 2), "has a range already; give each GPU one --normally"),
        ((*GPU, "--normally", "GPU-1=x-y"), "--normally GPU-1=x-y: must be"),
        (
            (*GPU, "--normally", f"{OTHER}=600-900"),
            f"--normally {OTHER}=...: the keeper may not set that GPU; name it by",
        ),
        ((*GPU, "--user", "nobody-at-all"), "there is no such user"),
    ],
)
def test_a_mistake_is_rejected_when_it_is_run_and_when_its_unit_is_printed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
    asked: tuple[str, ...],
) -> None:
    monkeypatch.setattr(rights, "sets_clocks", lambda: True)
    assert run(monkeypatch, "keeper", *options, *asked) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            (*GPU, "--socket", "/tmp/keeper.sock"),
            "--socket /tmp/keeper.sock: in a unit it must be in its own folder",
        ),
        ((*GPU, "--socket", "/run/keeper.sock"), "in its own folder under /run"),
        ((*GPU, "--state", "/var/lib"), "in its own folder under /var/lib"),
        ((*GPU, "--state", "/var/lib/../../etc"), "in its own folder under /var/lib"),
        ((*GPU, "--state", "/var/lib/a b"), "in its own folder under /var/lib"),
    ],
)
def test_a_mistake_shows_before_the_service_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert run(monkeypatch, "keeper", *options, "--unit") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_words_are_quoted_as_systemd_reads_them() -> None:
    text = unit_text(["/opt/a b/python", "100%", "$HOME", 'say "x"', "back\\slash", ""], SOCKET, STATE)
    assert 'ExecStart="/opt/a b/python" 100%% $$HOME "say \\"x\\"" "back\\\\slash" ""\n' in text
    with pytest.raises(ValueError, match="control characters are not allowed"):
        unit_text(["x\nExecStartPost=/bin/sh"], SOCKET, STATE)


@pytest.mark.usefixtures("became")
def test_warnings_are_printed_before_it_runs_as_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(rights, "sets_clocks", lambda: True)
    monkeypatch.setattr(keeper_unit, "program_warnings", lambda: ["/home/me can be changed"])
    with pytest.raises(BecameError):
        run(monkeypatch, "keeper", *GPU, "--socket", str(tmp_path / "keeper.sock"))
    assert run(monkeypatch, "keeper", *GPU, "--unit") == 0
    assert capsys.readouterr().err == "!! /home/me can be changed\n" * 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    file = tmp_path / "throttllem-keeper.service"
    text = unit_text(["/usr/bin/env", "python3"], SOCKET, STATE)
    file.write_text(text.replace("ProtectHome=read-only", "ProtectHome=yes"))
    verified = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, check=False, text=True)
    assert (verified.returncode, file.name in verified.stderr) == (0, False), verified.stderr
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)],
        capture_output=True,
        check=False,
        text=True,
    )
    exposure = re.findall(r"exposure level for \S+: ([0-9.]+)", judged.stdout)
    assert exposure, judged.stderr
    assert float(exposure[0]) <= 1.5
