"""`throttllem doctor` as a command: exit codes, JSON, wrong use. What it finds is in tests/doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import run

from throttllem.doctor import examine, restore
from throttllem.doctor.examine import Examined
from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.doctor.gpus import MEASURE_S
from throttllem.doctor.keeper_state import KeeperState, SocketState
from throttllem.physics.catalogue import Catalogue

FINE = (ok("driver", "is there"), note("keeper", "none runs", "start one"))
WRONG = (*FINE, trouble("GPU 0", "is on fire", "water"))


class Asked:
    """Stands for the examination, and remembers how it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.findings: tuple[Finding, ...] = FINE
        self.examined: list[tuple[Any, ...]] = []
        self.restored: list[tuple[Any, ...]] = []
        monkeypatch.setattr(examine, "examine", self.examine)
        monkeypatch.setattr(restore, "restore", self.restore)

    def examine(self, state: Path, socket: Path, zeusd: Path, measure_s: float | None, known: Catalogue) -> Examined:
        assert "l40s-48gb" in known.gpus
        self.examined.append((state, socket, zeusd, measure_s))
        return Examined(findings=self.findings, gpus=(), keeper=KeeperState(path=socket, socket=SocketState.ABSENT))

    def restore(self, state: Path, socket: Path, named: tuple[str, ...]) -> tuple[Finding, ...]:
        self.restored.append((state, socket, tuple(named)))
        return (ok("restore", "done"),)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.delenv("ZEUSD_SOCK_PATH", raising=False)
    return Asked(monkeypatch)


def test_nothing_to_mend(asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "doctor") == 0
    assert capsys.readouterr().out == "ok driver: is there\n-- keeper: none runs\n     start one\nnothing to correct\n"
    state, socket, zeusd = map(Path, ("/var/lib/throttllem", "/run/throttllem/keeper.sock", "/var/run/zeusd.sock"))
    assert asked.examined == [(state, socket, zeusd, MEASURE_S)]
    assert asked.restored == []


def test_something_to_mend(asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked.findings = WRONG
    assert run(monkeypatch, "doctor") == 1
    assert capsys.readouterr().out.endswith("!! GPU 0: is on fire\n     water\n1 to correct\n")


def test_json(asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked.findings = WRONG
    assert run(monkeypatch, "doctor", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1
    assert told["findings"] == [
        {"mark": "ok", "subject": "driver", "text": "is there", "remedy": None},
        {"mark": "--", "subject": "keeper", "text": "none runs", "remedy": "start one"},
        {"mark": "!!", "subject": "GPU 0", "text": "is on fire", "remedy": "water"},
    ]
    assert told["gpus"] == []
    assert told["keeper"]["runs"] is False


def test_options(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEUSD_SOCK_PATH", "/a/zeusd.sock")
    assert run(monkeypatch, "doctor", "--no-measure", "--socket", "/a/k.sock", "--state", "/b") == 0
    assert asked.examined == [(Path("/b"), Path("/a/k.sock"), Path("/a/zeusd.sock"), None)]


def test_restore_comes_first(asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "doctor", "--restore", "--gpu", "GPU-a", "--gpu", "GPU-b", "--state", "/b") == 0
    assert asked.restored == [(Path("/b"), Path("/run/throttllem/keeper.sock"), ("GPU-a", "GPU-b"))]
    assert capsys.readouterr().out.startswith("ok restore: done\nok driver: is there\n")


def test_a_gpu_is_named_only_to_be_restored(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--gpu", "GPU-a") == 2
    assert capsys.readouterr().err == "error: --gpu: only with --restore, which resets that GPU\n"
    assert asked.examined == []


def test_an_unknown_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "doctor", "--restor") == 2
