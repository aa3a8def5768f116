"""`python -m tools.options` writes docs/configuration.md: every option of `serve`, from the dataclasses themselves.

Where each is explained is its dataclass's docstring, which is quoted above its table.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from throttllem.cli.serve import PREFIX
from throttllem.config import RESOLVED, Options

FILE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration of `throttllem serve`

`python -m tools.options` writes this file from the code; a test says when it is out of date.

An option comes from, the later the stronger: a TOML file (`--config FILE`), the environment, `--set path=value` and
the flags of `serve --help`, which are short for some paths. An unknown option is an error that names the nearest known
one.

- In the file each section is a table (`[server]`), each engine one of `[[engines]]`, each class `[classes.NAME]`.
- Variables are in capitals, two underscores between levels; engines are numbered from 0: `{prefix}ENGINES__0__URL`.
- `none` takes an optional value away; lists are written with commas in variables and flags.
- `THROTTLLEM_CACHE_DIR` (`~/.cache/throttllem`) is where trained tables are kept; `THROTTLLEM_DEBUG=1` shows where an
  error came from.

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
    tbt_s = 0.1

    [classes.interactive]
    ttft_s = 0.5

`throttllem serve --check` prints every value that was set and where, what it would do, and for each engine whether
clocks would be off, advised or on, and why; it changes nothing. `ok`: as it should be; `--`: to be known; `!!`: to be
mended, an engine that is not up or a door without a key, say. Its exit code is 0 where there is no `!!`, 1 where there
is one and `serve` would start all the same (without what the line says is missing), 2 where it would not start. So a
script may stop at 2 before the engines are up, and at 1 once they are.
"""
PLACES = {"engines": "engines.N", "classes": "classes.NAME"}


def document() -> str:
    """The whole file."""
    parts = [HEAD.format(prefix=PREFIX), *sections(Options, "")]
    return "\n".join(parts)


def sections(kind: type, path: str) -> Iterator[str]:
    """A section with its docstring and its own options, then those in it."""
    hints = get_type_hints(kind)
    inner = [(item, _section(hints[item.name])) for item in fields(kind)]
    yield f"## {f'`{path}`' if path else 'At the top'}\n"
    yield _quoted(kind)
    yield "| option | variable | type | default |\n|---|---|---|---|"
    for item, section in inner:
        name = f"{path}.{item.name}".lstrip(".")
        if section is None and name not in RESOLVED:
            yield f"| `{name}` | `{_variable(name)}` | {_type(hints[item.name])} | {_default(item)} |"
    yield ""
    for item, section in inner:
        if section is not None:
            yield from sections(section, f"{path}.{PLACES.get(item.name, item.name)}".lstrip("."))


def _quoted(kind: type) -> str:
    """What a dataclass says of itself, without the words on options that cannot be set."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    return re.sub(r" `fixed_mhz`: for FIXED\.", "", text) + "\n"


def _section(kind: Any) -> type | None:
    """The dataclass that an option is, or holds by number or name; None: it is one value."""
    if is_dataclass(kind) and isinstance(kind, type):
        return kind
    held = [part for part in get_args(kind) if is_dataclass(part) and isinstance(part, type)]
    return held[0] if held and get_origin(kind) in (tuple, Mapping) else None


def _variable(name: str) -> str:
    return PREFIX + name.upper().replace(".", "__")


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
    return {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}[kind]


def _default(item: Field[Any]) -> str:
    value = item.default
    if value is MISSING:
        assert item.default_factory is not MISSING
        value = item.default_factory()
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        value = value.value
    return f"`{value}`" if value not in ((), {}, "") else "empty"


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
