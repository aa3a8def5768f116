"""The command: what it prints, writes and exits with."""

import json

import pytest
import typer
from gateway.flight.test_replay import edit, first_line, flown, is_dispatch
from typer.testing import CliRunner

from throttllem.cli.app import app as whole
from throttllem.cli.commands.replay import replay
from throttllem.gateway.flight.replay import ReplayError

app = typer.Typer()
app.command()(replay)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def record(tmp_path):
    _, (path,) = flown(tmp_path / "records")
    return path


def test_the_same(record, tmp_path):
    found = run(record, "--json", tmp_path / "out.json")
    assert found.exit_code == 0, found.output
    assert "the same commands: " in found.output
    assert "toy/model, policy least-energy" in found.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["same"] is True
    assert written["first_difference"] is None
    assert written["events"]["Stepped"] > 10
    for kind, count in (written["events"] | written["commands"]).items():
        assert kind in found.output
        assert f"{count:,}" in found.output


def test_different(record, tmp_path):
    number = first_line(record, is_dispatch)
    edit(record, number, lambda line: line["c"][0].update(request_id=4711))
    found = run(record, "--json", tmp_path / "out.json")
    assert found.exit_code == 1
    assert f"line {number}, at " in found.output
    assert "4711" in found.output
    assert "record and build part there" in found.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["same"] is False
    assert written["first_difference"]["line"] == number
    assert run(record, "--quiet").output == ""
    assert run(record, "--quiet").exit_code == 1


def test_cut_off_and_another_build_are_said(record):
    edit(record, 1, lambda line: line.update(build="[bold]old"))
    record.write_bytes(record.read_bytes()[:-2])
    found = run(record)
    assert found.exit_code == 0
    assert "warning: recorded by build [bold]old, this is" in found.output
    assert "warning: the file ends within a line" in found.output


def test_no_record(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    assert isinstance(run(tmp_path / "notes.txt").exception, ReplayError)
    assert isinstance(run(tmp_path / "none").exception, ReplayError)
    assert isinstance(run(tmp_path).exception, ReplayError)


def test_the_record_is_not_written_over(record):
    before = record.read_bytes()
    found = run(record, "--json", record)
    assert isinstance(found.exception, ValueError)
    assert record.read_bytes() == before


def test_control_characters_of_a_record_do_not_reach_the_terminal(record):
    evil = "\x1b]0;owned\x07\x1b[2Jtoy\u202e\x9b31m"
    edit(record, 1, lambda line: line.update(model=evil, policy=evil, build=evil, made_with={"numpy": evil}))
    number = first_line(record, is_dispatch)
    edit(record, number, lambda line: line["c"][0].update(request_id=4711, k=evil))
    found = run(record)
    assert found.exit_code == 1 and "4711" in found.output and r"\x1b]0;owned\x07" in found.output
    assert [letter for letter in found.output if not letter.isprintable() and letter != "\n"] == []


def test_control_characters_in_an_error_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "\x1b[2J.jsonl"
    path.write_text('{"schema": "\\u001b[2J"}\n')
    found = CliRunner().invoke(whole, ["replay", str(path)])
    assert found.exit_code == 2
    assert [letter for letter in found.output if not letter.isprintable() and letter != "\n"] == []
