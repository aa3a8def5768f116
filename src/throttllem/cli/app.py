"""The command line; each command is a module of `commands`. A user's error is one sentence on stderr, exit code 2.

Every module is light, so that `throttllem --help` is quick: what computes is imported by the command that runs.
"""

from __future__ import annotations

import signal
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from throttllem.cli.commands.agent import agent
from throttllem.cli.commands.calibrate import calibrate
from throttllem.cli.commands.demo import demo
from throttllem.cli.commands.doctor import doctor
from throttllem.cli.commands.estimate import estimate
from throttllem.cli.commands.keeper import keeper
from throttllem.cli.commands.profile import profile
from throttllem.cli.commands.replay import replay
from throttllem.cli.commands.serve import serve
from throttllem.cli.commands.simulate import simulate
from throttllem.cli.commands.studies.arena import arena
from throttllem.cli.commands.studies.characterize import characterize
from throttllem.cli.commands.studies.reproduce import reproduce
from throttllem.cli.commands.train import train
from throttllem.cli.terminal import printable

OPTIONAL = frozenset({"lightgbm", "plotly", "polars", "scipy"})
"""Packages that serving does not need."""
EXTRAS = MappingProxyType({"serve": "profile", "profile": "profile", "train": "profile", "calibrate": "calibrate"})
"""By command: the extra of this package that installs what it needs; else `simulate`."""
_INTERRUPTED = 130
"""Exit code of a command that a signal ended (128 + SIGINT)."""


class Commands(TyperGroup):
    """The commands, and what becomes of an exception that one of them raises."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. An error that the user can mend is printed, `--debug` shows where it came from."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            text = str(error)
            if isinstance(error, ModuleNotFoundError):
                package = (error.name or "").partition(".")[0]
                if package not in OPTIONAL:
                    raise
                text = _explained(str(ctx.invoked_subcommand), package)
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {printable(text)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands,
    help="Serve LLMs at the least energy that meets every latency SLO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (
    serve,
    keeper,
    agent,
    doctor,
    replay,
    simulate,
    demo,
    arena,
    reproduce,
    characterize,
    profile,
    train,
    calibrate,
    estimate,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"throttllem {version('throttllem')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="THROTTLLEM_DEBUG", help="Show where in the code an error came from.")
    ] = False,
) -> None:
    """Serve LLMs at the least energy that meets every latency SLO."""


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop is an interrupt: what was begun is taken back
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("interrupted", err=True)
        raise


def _explained(command: str, package: str) -> str:
    """What to do about a package that an extra installs."""
    text = f"{command} needs the package {package}, which is not installed here: "
    text += f"pip install 'throttllem[{EXTRAS.get(command, 'simulate')}]', or throttllem[all] for every command"
    if command == "serve":
        text += "; or serve an engine (--engine, --triton), or give the simulated one a table (--tables)"
    return text
