"""Where options come from: defaults, a TOML file, the environment, `--set` and flags, each stronger than the last.

pydantic-settings reads and merges them. Added here: where each value was set (file and line, variable, flag), an error
for a name that does not exist, former names, and durations with a unit. A secret is never shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import from_json
from pydantic_settings import EnvSettingsSource, SettingsError, TomlConfigSettingsSource

from throttllem.config import FORMER_VALUES, RENAMED, RESOLVED, Options
from throttllem.core.types import OptionError
from throttllem.did_you_mean import did_you_mean

PREFIX = "THROTTLLEM_"
NO_OPTIONS = ("THROTTLLEM_STATS", "THROTTLLEM_STATS_SECRET", "THROTTLLEM_DEBUG")
"""Variables with the prefix that set no option: of the plug-in in vLLM's process, and of the flag `--debug`."""

Node = dict[str, Any]
Path_ = tuple[str, ...]
Flags = Mapping[str, tuple[str, object]]
"""By the option that a flag sets: the flag, and its value (None: not given)."""

_SECONDS = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


class ConfigurationError(ValueError):
    """An option that does not exist, or has a value that cannot be used; the message names where it was set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The options. `origins`: where each that is not a default was set. `notes`: former names that were used."""

    options: Options
    origins: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """Values from one place, nested as the tree is, elements of lists under "0", "1" ...; `where` a path was set."""

    values: Node
    where: Callable[[str], str]


def load_options(*, file: Path | None = None, settings: Iterable[str] = (), flags: Flags | None = None) -> Loaded:
    """The options from every source. `settings` are texts like `server.port=8001`. Raises ConfigurationError."""
    layers = [_file(file)] if file else []
    layers += [_environment(), _settings(settings), *_flags(flags or {})]
    origins: dict[str, str] = {}
    notes: list[str] = []
    merged: Node = {}
    for layer in layers:
        for path, value, where in _checked(layer, notes):
            _put(merged, path, value)
            if value != {}:
                origins[".".join(path)] = where
    try:
        options = Options(**merged)
    except ValidationError as error:
        raise _explained(error, origins) from error
    return Loaded(options=options, origins=origins, notes=tuple(dict.fromkeys(notes)))


def seconds(text: str) -> float:
    """A duration as text, in seconds: `5s`, `200ms`, `2m`, `1h`; a number alone is in seconds. Raises ValueError."""
    parts = re.fullmatch(r"(-?inf|nan|[-+.\d]+(?:e[-+]?\d+)?)\s*([a-z]*)", text.strip().lower())
    try:
        number, unit = parts.groups() if parts else ("", "")
        return float(number) * _SECONDS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r}: must be a duration, as in 5s, 200ms or 2m, or a number of seconds") from None


def variable(path: str) -> str:
    """The environment variable of an option."""
    return PREFIX + path.upper().replace(".", "__")


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a tree with its path; a secret that is set is "(not shown)"."""
    if isinstance(tree, Options):
        for name in Options.model_fields:
            yield from leaves(getattr(tree, name), name)
    elif is_dataclass(tree):
        for item in fields(tree):
            below = f"{path}.{item.name}"
            if item.repr or getattr(tree, item.name) in (None, ()):
                yield from leaves(getattr(tree, item.name), below)
            else:
                yield below, "(not shown)"
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{path}.{name}")
    elif isinstance(tree, tuple) and tree and is_dataclass(tree[0]):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, tree


# ---- the sources ----------------------------------------------------------------------------------------------


def _file(path: Path) -> _Layer:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        values = TomlConfigSettingsSource(Options, toml_file=path)()
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file; without --config every option has its default") from error
    except (ValueError, OSError) as error:  # ValueError: no TOML, no UTF-8, or a number of thousands of digits
        raise ConfigurationError(f"{path}: {error}") from error
    lines = _lines(text)

    def where(at: str) -> str:
        while at and at not in lines:
            at = at.rpartition(".")[0]
        return f"{path}:{lines[at]}" if at else str(path)

    return _Layer(values=_numbered(values), where=where)


def _environment() -> _Layer:
    try:
        values = _numbered(EnvSettingsSource(Options)())
    except SettingsError as error:
        problem = f"{error}; set one option of the section, as in {variable('slo.e2e_s')}"
        raise ConfigurationError(f"environment: {problem}") from error
    for name, text in os.environ.items():  # what pydantic-settings does not look for
        path = name.removeprefix(PREFIX).lower().split("__")
        if not name.startswith(PREFIX) or name in NO_OPTIONS or path[0] in Options.model_fields:
            continue
        if path[0] not in RENAMED:
            hint = did_you_mean(path[0], list(Options.model_fields))
            raise ConfigurationError(f"{name}: unknown option {path[0]}; {hint}")
        _put(values, tuple(path), text)
    return _Layer(values=values, where=variable)


def _settings(settings: Iterable[str]) -> _Layer:
    found: Node = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigurationError(f"--set {setting}: write section.name=value")
        _put(found, tuple(path.strip().split(".")), text.strip())
    return _Layer(values=found, where=lambda _: "--set")


def _flags(flags: Flags) -> Iterator[_Layer]:
    for path, (flag, value) in flags.items():
        if value is not None:
            found: Node = {}
            _put(found, tuple(path.split(".")), value)
            yield _Layer(values=found, where=lambda _, flag=flag: flag)  # type: ignore[misc]


def _numbered(value: Any) -> Any:
    """Lists of tables under their numbers, so that files, variables and flags merge alike."""
    if isinstance(value, dict):
        return {key: _numbered(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(index): _numbered(item) for index, item in enumerate(value)}
    return value


def _lines(text: str) -> dict[str, int]:
    """Lines of keys by their paths, but for keys inside an inline table or a text of several lines."""
    found: dict[str, int] = {}
    table, counts = "", dict[str, int]()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([\w.\"'-]+)\s*\]", line):
            table = re.sub(r"[\"']", "", header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = f"{table}.{counts[table]}"
            found.setdefault(table, number)
        elif key := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            path = re.sub(r"[\"']", "", key[1])
            found.setdefault(f"{table}.{path}" if table else path, number)
    return found


# ---- names and values -----------------------------------------------------------------------------------------


def _checked(layer: _Layer, notes: list[str]) -> Iterator[tuple[Path_, Any, str]]:
    """Every value of a layer under its present name, as the tree takes it, and where it was set. Adds to `notes`."""
    for named, given in _leaves(layer.values):
        where = layer.where(".".join(named))
        path = (RENAMED.get(named[0], named[0]), *named[1:])
        name = ".".join(path)
        if path != named:
            notes.append(f"{where}: {'.'.join(named)} is now called {name}")
        kind = _type_of(path, where)
        if name in RESOLVED:
            raise ConfigurationError(f"{where}: {name} follows from policy and cannot be set")
        former = FORMER_VALUES.get((name, given)) if isinstance(given, str) else None
        if former is not None:
            notes.append(f"{where}: {name} = {given} is now called {former}")
        yield path, _converted(kind, name, given if former is None else former, where), where


def _type_of(path: Path_, where: str) -> Any:
    """The type of an option. Raises ConfigurationError for the first part of a path that the tree does not have."""
    kind: Any = Options
    for depth, part in enumerate(path):
        kind, above = _inner(kind), "".join(f"{name}." for name in path[:depth])
        if kind is Options or is_dataclass(kind):
            hints = get_type_hints(kind)
            names = list(Options.model_fields) if kind is Options else [item.name for item in fields(kind)]
            if part not in names:
                hint = did_you_mean(part, names)
                hint = hint.replace("mean ", f"mean {above}") if hint.endswith("?") else hint
                if depth > 1 and path[0] == "classes":
                    hint += f' (a name with a dot needs quotes: [classes."{path[1]}.{part}"])'
                raise ConfigurationError(f"{where}: unknown option {above}{part}; {hint}")
            kind = hints[part]
        elif get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
            if not re.fullmatch(r"\d{1,3}", part):
                raise ConfigurationError(
                    f"{where}: {above}{part}: {path[depth - 1]} is a list; write [[{path[depth - 1]}]], "
                    f"or with --set {path[depth - 1]}.0.{part}"
                )
            kind = get_args(kind)[0]
        elif get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
            kind = get_args(kind)[1]
        else:
            raise ConfigurationError(f"{where}: {'.'.join(path)}: {path[depth - 1]} is one value, not a section")
    return _inner(kind)


def _converted(kind: Any, path: str, value: Any, where: str) -> Any:
    """Text as the tree takes it: `none` is None, a list has commas or is JSON, a duration becomes seconds."""
    if value == {}:  # an empty table: an engine with the defaults
        return value
    if is_dataclass(kind):
        raise ConfigurationError(f"{where}: {path} is a section; set one of its options")
    if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
        raise ConfigurationError(f"{where}: {path} is a list of sections; write [[{path}]]")
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    if get_origin(kind) is tuple:
        if value.startswith("["):
            with suppress(ValueError):
                return from_json(value)
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind is float and path.endswith("_s"):
        try:
            return seconds(value)
        except ValueError as error:
            raise ConfigurationError(f"{where}: {path} = {error}") from None
    return value


def _explained(error: ValidationError, origins: Mapping[str, str]) -> ConfigurationError:
    """The first fault by the full name of its option, and where that was set."""
    first = error.errors()[0]
    at = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, OptionError):
        at = f"{at}.{cause.name}".lstrip(".")
        text = f"{at}{cause.shown}: {cause.problem}"
    else:
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_type" and isinstance(first["input"], int | float):
            problem = "must be text: put it in quotes"
        shown = "" if _is_secret(at) else f" = {first['input']!r}"
        text = f"{at}{shown}: {problem}"
    # An element of a list was set where the list was; an engine, where one of its options was.
    near = (path for path in (at, at.rpartition(".")[0]) if path in origins)
    set_as = next(near, next((path for path in origins if path.startswith(f"{at}.")), None))
    return ConfigurationError(f"{origins[set_as]}: {text}" if set_as else text)


def _is_secret(path: str) -> bool:
    """Whether an option is one that must not be shown, or an element of it."""
    kind: Any = Options
    for part in path.split("."):
        kind = _inner(kind)
        if is_dataclass(kind):
            if not next((item.repr for item in fields(kind) if item.name == part), True):
                return True
            kind = get_type_hints(kind).get(part)
        elif kind is Options:
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is not None:
            kind = get_args(kind)[-1 if issubclass(get_origin(kind), Mapping) else 0]
    return False


def _put(node: Node, path: Path_, value: Any) -> None:
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigurationError(f"{'.'.join(path)}: {part} is one value, not a section")
    node[path[-1]] = value


def _leaves(node: Node, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def _inner(kind: Any) -> Any:
    """The type behind an optional one."""
    if get_origin(kind) in (Union, UnionType):
        given = [part for part in get_args(kind) if part is not type(None)]
        return given[0] if len(given) == 1 else kind
    return kind
