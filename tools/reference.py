"""`python -m tools.reference` writes docs/reference: every option, command and metric, from the code itself.

A test compares the committed pages with `pages()`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from throttllem.cli.app import app
from throttllem.config import RESOLVED, Options
from throttllem.core.types import Slo
from throttllem.gateway.telemetry.measures import StatusCollector
from throttllem.gateway.telemetry.metrics import Histograms
from throttllem.gateway.telemetry.status import GatewayStatus
from throttllem.option_sources import variable

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
GENERATED = "<!-- Written by `python -m tools.reference` from the code. Do not edit. -->\n"
PLACES = {"engines": "engines.N", "classes": "classes.NAME"}
UNITS = {
    "s": "s",
    "bytes": "bytes",
    "tokens": "tokens",
    "mhz": "MHz",
    "rps": "requests/s",
    "seconds": "s",
    "joules": "J",
    "watts": "W",
    "hertz": "Hz",
    "ratio": "1 = 100 %",
    "blocks": "blocks",
    "requests": "requests",
    "sequences": "sequences",
}
"""Units by the last part of a name."""

CONFIGURATION = """\
# Configuration

Every option has a default. It can be set, the later the stronger, in a TOML file (`--config FILE`), in the
environment, with `--set NAME=VALUE`, and with a command's own flags, which are short for some options ([Command
line](cli.md)). All commands read the same options; each uses those that concern it. An unknown name is an error that
names the nearest known one.

- In a file each section is a table (`[server]`), each engine one `[[engines]]`, each class of SLOs `[classes.NAME]`.
- A variable is `THROTTLLEM_` and the option's name in capitals, two underscores for each dot; engines are numbered
  from 0: `THROTTLLEM_ENGINES__0__URL`.
- `--set engines.0.url=http://127.0.0.1:8001` numbers engines likewise.
- A duration is a number of seconds, or has a unit: `5s`, `200ms`, `2m`, `1h`.
- In a variable and in `--set`, `none` removes an optional value, and commas separate the elements of a list.
- Former names work and are noted: the section `engine` is now `batching`, `clocks.mode = "advise"` is `"dry-run"`.

```toml
[server]
port = 8000

[[engines]]
kind = "openai"
url = "http://127.0.0.1:8001"
gpu = "h100-80gb-sxm"
model = "llama-3-8b"
tables = "tables"

[slo]
e2e_s = 20.0
tbt_s = "100ms"

[classes.interactive]
ttft_s = "500ms"
```

`throttllem serve --check` prints every value that was set and where, what it would do, and for each engine whether its
clocks would be off, a dry run or on, and why. It changes nothing. A line begins with `ok`, with `--` for a note, or
with `!!` for something to correct: an engine that is not up, for example, or an API that is open without a key. The
exit code is 0 without any `!!`, 1 if `serve` would start all the same, and 2 if it would not. A script may therefore
stop at 2 before the engines are up, and at 1 once they are.

Three variables are no options: `THROTTLLEM_STATS` and `THROTTLLEM_STATS_SECRET`, which the plug-in reads in vLLM's
process, and `THROTTLLEM_DEBUG=1`, which is the flag `--debug`.
"""

CLI = """\
# Command line

`throttllem COMMAND --help` prints the same. Exit codes: 0 for success; 2 for wrong use or a value that cannot be used,
with one sentence on stderr about what to do; 130 after a signal; 1 where a command's text says so. A duration is a
number of seconds, or has a unit (`200ms`, `5s`, `2m`). A command whose packages are not installed names the extra that
installs them: serving needs none, `throttllem[all]` installs all.

A long command shows its progress on stderr: bars on a terminal, a line now and then elsewhere.
"""

METRICS = """\
# Metrics

`GET /metrics` answers in Prometheus' text format. Base units throughout. A value that is not known has no sample: a
zero is a measured zero. Counters begin at 0 when the gateway starts; "recent" is the last 5 minutes.

`model` is the first name that a model is served by, `engine` the name of an engine. No label names a client or a
request, so the number of series depends on the configuration alone. Metrics of a request have the names of
OpenTelemetry's [semantic conventions for generative AI](https://github.com/open-telemetry/semantic-conventions-genai)
where one exists, with dots as underscores and the unit appended.
"""


def pages() -> dict[str, str]:
    """The text of every page by its file's name."""
    return {
        "configuration.md": GENERATED + CONFIGURATION + "\n" + "\n".join(_sections(Options, "")),
        "cli.md": GENERATED + CLI + "\n" + "\n".join(_commands()),
        "metrics.md": GENERATED + METRICS + "\n" + "\n".join(_metrics()),
    }


# ---- options --------------------------------------------------------------------------------------------------


def _sections(kind: type, path: str) -> Iterator[str]:
    """A section with its own options, then the sections in it."""
    hints, meanings = get_type_hints(kind), _meanings(kind)
    inner = {name: _section(hints[name]) for name in _names(kind)}
    yield f"## {f'`{path}`' if path else 'Options of no section'}\n"
    yield f"{' '.join((inspect.getdoc(kind) or '').split())}\n"
    yield "| option | type | default | unit | meaning | variable |\n|---|---|---|---|---|---|"
    for name, section in inner.items():
        full = f"{path}.{name}".lstrip(".")
        if section is None and full not in RESOLVED:
            cells = (
                f"`{full}`",
                _type(hints[name]).replace("number", "duration") if name.endswith("_s") else _type(hints[name]),
                _default(kind, name),
                UNITS.get(name.rpartition("_")[2], "") if "_" in name else "",
                meanings[name],
                f"`{variable(full)}`",
            )
            yield f"| {' | '.join(cells)} |"
    yield ""
    for name, section in inner.items():
        if section is not None:
            yield from _sections(section, f"{path}.{PLACES.get(name, name)}".lstrip("."))


def _names(kind: type) -> list[str]:
    return list(Options.model_fields) if kind is Options else [item.name for item in fields(kind)]


def _meanings(kind: type) -> dict[str, str]:
    """The text below each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found


def _section(kind: Any) -> type | None:
    """The dataclass that an option is, or holds by number or name; None: it is one value."""
    if is_dataclass(kind) and isinstance(kind, type):
        return kind
    held = [part for part in get_args(kind) if is_dataclass(part) and isinstance(part, type)]
    return held[0] if held and get_origin(kind) in (tuple, Mapping) else None


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_type(part) for part in get_args(kind) if part is not type(None)]
        return " or ".join([*parts, "`none`"] if type(None) in get_args(kind) else parts)
    if get_origin(kind) is tuple:
        return f"list of {_type(get_args(kind)[0])}"
    if get_origin(kind) is Mapping:
        return f"{_type(get_args(kind)[1])} by {_type(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{value.value}`" for value in kind)
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    return names[kind]


def _default(kind: type, name: str) -> str:
    if kind is Options:
        value = Options.model_fields[name].get_default(call_default_factory=True)
    else:
        item = next(item for item in fields(kind) if item.name == name)
        value = item.default
        if item.default_factory is not MISSING:
            value = item.default_factory()
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        value = value.value
    return f"`{value}`" if value not in ((), {}, "") else "empty"


# ---- commands -------------------------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    yield "## `throttllem`\n"
    yield from _parameters(group)
    for name, command in group.commands.items():
        arguments = [_label(each) for each in command.params if each.param_type_name == "argument"]
        yield f"## `throttllem {' '.join([name, *arguments])}`\n"
        yield f"{' '.join(command.help.split())}\n"
        yield from _parameters(command)


def _parameters(command: Any) -> Iterator[str]:
    yield "| parameter | default | meaning |\n|---|---|---|"
    for each in command.params:
        shown = " ".join((each.help or "").split())
        shown += f" Variable: `{each.envvar}`." if each.envvar else ""
        yield f"| {_spelled(each)} | {_shown_default(each)} | {_escaped(shown)} |"
    yield ""


def _spelled(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_label(parameter)}`"
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    return names if parameter.is_flag else f"{names} `{_label(parameter)}`"


def _label(parameter: Any) -> str:
    """What stands for the value."""
    if parameter.metavar or parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    kind = parameter.type_descriptor.annotation
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _shown_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False) else f"`{str(parameter.default).lower()}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- metrics --------------------------------------------------------------------------------------------------


def _metrics() -> Iterator[str]:
    empty = GatewayStatus(version="", policy="", phase="serving", now_s=0.0, slo=Slo(), models=())
    registry = CollectorRegistry()
    registry.register(StatusCollector(empty))
    histograms = Histograms()
    registry.register(histograms)
    labelled = {f"{each._name}": each._labelnames for each in vars(histograms).values()}
    groups: dict[str, list[Metric]] = {}
    for metric in registry.collect():
        labels = _labels(metric) or labelled.get(metric.name, ())
        about = "An engine" if "engine" in labels else "A model" if "model" in labels else "The gateway"
        groups.setdefault("A request" if metric.name.startswith("gen_ai") else about, []).append(metric)
    for title in ("The gateway", "A model", "A request", "An engine"):
        yield f"## {title}\n"
        yield "| metric | type | unit | labels | meaning |\n|---|---|---|---|---|"
        for metric in groups[title]:
            name = metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")
            labels = ", ".join(f"`{label}`" for label in _labels(metric) or labelled.get(metric.name, ()))
            unit = UNITS.get(metric.name.rpartition("_")[2], "")
            yield f"| `{name}` | {metric.type} | {unit} | {labels} | {metric.documentation} |"
        yield ""


def _labels(metric: Metric) -> tuple[str, ...]:
    """The names of its labels, from the family or from a sample."""
    return tuple(getattr(metric, "_labelnames", ())) or tuple(
        dict.fromkeys(label for sample in metric.samples for label in sample.labels if label != "le")
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
