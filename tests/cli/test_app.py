"""The command line as a whole: its help is quick, its errors are one sentence."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from command import run

from throttllem.cli.app import OPTIONAL, app
from throttllem.profiling.live.plan import POINTS
from throttllem.profiling.measure import ProfilePlan

HEAVY = ("numpy", "pydantic", "polars", "lightgbm", "scipy", "plotly", "asyncio", "starlette", "pynvml")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout


def test_help_imports_nothing_heavy():
    code = "import sys, throttllem.cli.app as a, typer; typer.main.get_command(a.app); print(*sys.modules)"
    assert set(HEAVY) & set(python(code).split()) == set()


def test_serving_imports_nothing_of_an_extra():
    code = (
        "import sys, throttllem.gateway.run, throttllem.gateway.check, throttllem.option_sources; print(*sys.modules)"
    )
    assert OPTIONAL & set(python(code).split()) == set()


def test_every_optional_package_is_in_an_extra():
    """And in no requirement of the package itself."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {
        extra: {re.match(r"[\w-]+", each)[0] for each in needs}
        for extra, needs in project["optional-dependencies"].items()
    }
    assert not OPTIONAL & {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
    assert names["all"] == OPTIONAL == names["profile"] | names["simulate"] | names["calibrate"]


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("throttllem 0.")


def test_every_command_has_a_summary_and_every_option_a_meaning():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", ""), f"{name} {parameter.name}"


def test_defaults_in_the_help_are_those_of_the_code():
    helps = {parameter.name: parameter.help for parameter in typer.main.get_command(app).commands["profile"].params}
    assert f"{POINTS} without --seconds" in helps["points"]
    assert f"default {ProfilePlan().rows}" in helps["rows"]


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("simulate", "polars", "simulate"),
        ("train", "lightgbm.basic", "profile"),
        ("demo", "plotly", "simulate"),
        ("serve", "polars", "profile"),
        ("calibrate", "scipy.optimize", "calibrate"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, capsys, command, package, extra):
    def load(*_, **__):
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    for module in ("arguments", f"commands.{command}"):
        monkeypatch.setattr(f"throttllem.cli.{module}.load", load)
    needed = {"train": ["p.csv", "--out", "x"], "calibrate": ["p.csv", "--out", "x"]}.get(command, [])
    assert run(monkeypatch, command, *needed) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {command} needs the package {package.partition('.')[0]}, ")
    assert f"pip install 'throttllem[{extra}]'" in error
    assert ("--tables" in error) == (command == "serve")


def test_another_missing_module_is_no_users_error(monkeypatch):
    def load(*_, **__):
        raise ModuleNotFoundError("No module named 'throttllem.nowhere'", name="throttllem.nowhere")

    monkeypatch.setattr("throttllem.cli.commands.demo.load", load)
    with pytest.raises(ModuleNotFoundError):
        run(monkeypatch, "demo")


@pytest.mark.parametrize("debug", [("--debug",), ()])
def test_debug_shows_where_an_error_came_from(monkeypatch, capsys, debug):
    if not debug:
        monkeypatch.setenv("THROTTLLEM_DEBUG", "1")
    with pytest.raises(ValueError, match="--log-level loud"):
        run(monkeypatch, *debug, "serve", "--log-level", "loud")
