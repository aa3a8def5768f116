"""`throttllem serve` as a user meets it: a real process, a stream to OpenAI's client, signals, exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
from command import run

QUICK = ("--policy", "triton", "--port", "0", "--set", "noise.time=0")
"""Nothing is trained for the baseline."""
Try = Callable[..., "Tried"]


class Served:
    """A gateway in a process of its own, and what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._listening = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self._listening.wait(60), self.lines

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if "dashboard" in line:
                self._listening.set()
        self._listening.set()

    @property
    def url(self) -> str:
        return next(line.split()[1] for line in self.lines if line.startswith("API ")).removesuffix("/v1")


@contextlib.contextmanager
def served(tmp_path: Path, *options: str) -> Iterator[Served]:
    environment = {**os.environ, "THROTTLLEM_STATE_DIR": str(tmp_path / "state")}

    program = [sys.executable, "-c", "from throttllem.cli.app import main; main()", "serve", *options]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Served(process)
    finally:
        process.kill()
        process.communicate()


def test_a_stream_is_served_and_a_signal_lets_it_end(tmp_path: Path) -> None:
    with served(tmp_path, *QUICK) as gateway, openai.OpenAI(base_url=gateway.url + "/v1", api_key="x") as client:
        stream = client.chat.completions.create(
            model="llama-3-8b",
            messages=[{"role": "user", "content": "Hello"}],
            stream=True,
            max_tokens=40,
            extra_body={"ignore_eos": True, "min_tokens": 40},
        )
        words = [next(stream)]
        gateway.process.send_signal(signal.SIGTERM)
        words += stream
        assert gateway.process.wait(30) == 0
        gateway.reader.join(10)
    assert len(words) >= 40
    assert words[-1].choices[0].finish_reason == "length"
    assert gateway.lines[-1] == "stopped"
    assert any(line.startswith("stopping: 1 requests have up to 30 s") for line in gateway.lines)
    assert sorted(file.name for file in (tmp_path / "state").iterdir()) == [
        ".lock",
        "flight",
        "lengths-llama-3-8b.json",
    ]


@dataclass(frozen=True)
class Tried:
    """One run in this process."""

    code: int
    out: str
    err: str


@pytest.fixture(name="tried")
def tried_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Try:
    monkeypatch.setenv("THROTTLLEM_STATE_DIR", str(tmp_path / "state"))

    def tried(*arguments: str) -> Tried:
        code = run(monkeypatch, "serve", "--port", "0", *arguments)
        out, err = capsys.readouterr()
        return Tried(code, out, err)

    return tried


def test_a_port_that_is_taken_is_one_sentence(tried: Try, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = tried("--port", str(port))
    assert result.code == 2
    assert result.err == f"error: server.port = {port}: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "http://a", "--triton", "http://b"], "--engine and --triton: give one of them"),
        (["--set", "limits.drain=1"], "unknown option limits.drain; did you mean limits.drain_s?"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such file; without --config every option has its default"),
        (["--policy", "fastest"], "unknown policy 'fastest'"),
        (["--set", "length.predictor=oracle"], "--set: length.predictor = oracle: output lengths are not known"),
        (["--clocks", "on"], "--clocks: clocks.mode = 'on': no engine names its GPUs"),
        (["--gpus", "0"], "--gpus: engines.0.gpus = 0: a simulated engine has no GPUs"),
        (["--log-level", "loud"], "--log-level loud: must be one of debug, info, warning, error"),
        (["--engine", "127.0.0.1:8001"], "must begin with http:// or https://"),
        (["--slo-e2e", "-1"], "--slo-e2e: slo.e2e_s = -1.0: must be a positive number"),
        (["--host", "no.such.host.invalid"], "server.host = 'no.such.host.invalid'"),
    ],
)
def test_what_cannot_be_is_one_sentence(tried: Try, arguments: list[str], said: str) -> None:
    result = tried(*arguments)
    assert result.code == 2
    assert said in result.err
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1


def test_a_variable_that_is_no_option(tried: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROTTLLEM_SERVER__PROT", "1")
    result = tried("--check")
    assert (result.code, "did you mean server.port?" in result.err) == (2, True)


def test_check_says_where_every_value_came_from_and_touches_nothing(
    tried: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "t.toml"
    file.write_text("policy = 'throttllem'\n[slo]\ntbt_s = 0.1\n")
    monkeypatch.setenv("THROTTLLEM_LIMITS__DRAIN_S", "3")
    monkeypatch.delenv("THROTTLLEM_CACHE_DIR", raising=False)
    result = tried("--config", str(file), "--check", "--slo-e2e", "4")
    assert result.code == 0, result
    values = dict(re.findall(r"^ok (\S+) = .*   \((.*)\)$", result.out, re.MULTILINE))
    assert values == {
        "policy": f"{file}:1",
        "slo.tbt_s": f"{file}:3",
        "slo.e2e_s": "--slo-e2e",
        "server.port": "--port",
        "limits.drain_s": "THROTTLLEM_LIMITS__DRAIN_S",
        "state_dir": "THROTTLLEM_STATE_DIR",
    }
    assert list(tmp_path.iterdir()) == [file]
    assert result.out.splitlines()[-1] == "nothing to correct"


def test_check_of_what_would_start_with_trouble_says_so_in_its_exit_code(tried: Try) -> None:
    result = tried("--check", "--host", "0.0.0.0")
    assert (result.code, result.err) == (1, "")
    assert "!! no API keys, and 0.0.0.0 is not loopback" in result.out
    assert result.out.splitlines()[-1] == "1 to correct; serve would start all the same"


def test_check_of_what_would_not_start_fails(tried: Try, tmp_path: Path) -> None:
    result = tried("--check", "--tp", "3")
    assert result.code == 2
    assert "3 GPUs" in result.out
    assert result.out.splitlines()[-1] == "1 to correct; serve would not start"
    assert list(tmp_path.iterdir()) == []
