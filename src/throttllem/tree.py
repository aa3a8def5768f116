"""Option trees: frozen dataclasses filled from a TOML file, the environment and flags, in that order.

Every option is written once, as a field; its key in the file, its variable and its flag follow from the name. Unknown
keys are refused with the nearest known one. Knows no option by name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

Node = dict[str, Any]
T = TypeVar("T")


class TreeError(ValueError):
    """An option that does not exist or does not hold such a value; says which, where it was set, and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Options from one place. `values` nest as the tree does, list elements under "0", "1" ...; leaves may be text.
    `lines`: where each stands in the file, by its path, as far as that was found.
    """

    origin: str
    values: Node
    lines: Mapping[str, int] = field(default_factory=dict)

    def at(self, path: str) -> str:
        """Where an option was set, for people."""
        return f"{self.origin}:{self.lines[path]}" if path in self.lines else self.origin


def from_toml(path: Path) -> Source:
    """A TOML file. Raises TreeError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError as error:
        raise TreeError(f"{path}: no such file; without --config the simulated engine is served") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise TreeError(f"{path}: {error}") from error
    numbered: Node = _numbered(values)
    return Source(origin=str(path), values=numbered, lines=_lines(text))


def from_environment(environ: Mapping[str, str], prefix: str, others: Collection[str] = ()) -> Source:
    """Variables like PREFIX_SERVER__PORT: two underscores between levels. `others` begin alike and are no options."""
    found: Node = {}
    for name, text in environ.items():
        if name.startswith(prefix) and name not in others:
            _put(found, name.removeprefix(prefix).lower().split("__"), text, name)
    return Source(origin="environment", values=found)


def from_settings(settings: Iterable[str]) -> Source:
    """Texts like `server.port=8001`, as flags give them."""
    found: Node = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise TreeError(f"option {setting!r}: write section.name=value")
        _put(found, path.strip().split("."), text.strip(), path.strip())
    return Source(origin="command line", values=found)


def build(kind: type[T], sources: Iterable[Source], resolved: Collection[str] = ()) -> tuple[T, dict[str, str]]:
    """The tree, and for every value that is not a default the path and where it was set. Raises TreeError.

    `resolved` are paths that follow from other options and cannot be set.
    """
    merged: Node = {}
    origins: dict[str, str] = {}
    for source in sources:
        for path, value in _leaves(source.values):
            _known(kind, path, source.at(".".join(path)))
            if ".".join(path) in resolved:
                raise TreeError(
                    f"{source.at('.'.join(path))}: {'.'.join(path)} follows from other options and cannot be set"
                )
            _put(merged, path, value, ".".join(path))
            origins[".".join(path)] = source.at(".".join(path))
    try:
        return TypeAdapter(kind).validate_python(_typed(kind, merged)), origins
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_type" and isinstance(first["input"], int | float):
            said = "must be text: put it in quotes"  # and may be a secret
        set_as = at if at in origins else at.rpartition(".")[0]  # an element stands where its list does
        if set_as in origins:
            shown = f"{at} = {first['input']!r}" if _may_show(kind, set_as) else at
            at = f"{origins[set_as]}: {shown}"
        at = f"{at}: " if at else ""
        raise TreeError(at + said) from error


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a tree with its path."""
    if is_dataclass(tree):
        for item in fields(tree):
            if item.repr or getattr(tree, item.name) in (None, ()):
                yield from leaves(getattr(tree, item.name), f"{path}.{item.name}" if path else item.name)
            else:
                yield (f"{path}.{item.name}" if path else item.name), "(not shown)"
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from leaves(value, f"{path}.{name}")
    elif isinstance(tree, tuple) and tree and is_dataclass(tree[0]):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, tree


def _numbered(value: Any) -> Any:
    """Lists of tables under their numbers, so that files, variables and flags merge alike."""
    if isinstance(value, dict):
        return {key: _numbered(item) for key, item in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(index): _numbered(item) for index, item in enumerate(value)}
    return value


def _lines(text: str) -> dict[str, int]:
    """Lines of keys by their paths; not of what is inside of an inline table or a text of several lines."""
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


def _put(node: Node, path: list[str], value: Any, said: str) -> None:
    for part in path[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise TreeError(f"{said}: {part} is one value, not a section")
    node[path[-1]] = value


def _leaves(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield [*path, name], value


def _known(kind: Any, path: list[str], origin: str) -> None:
    """Raise TreeError for the first part of a path that the tree does not have."""
    for depth, part in enumerate(path):
        kind = _inner(kind)
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            names = [item.name for item in fields(kind)]
            if part not in names:
                near = difflib.get_close_matches(part, names, n=1, cutoff=0.5)
                above = "".join(f"{name}." for name in path[:depth])
                hint = f"did you mean {above}{near[0]}?" if near else f"known here: {', '.join(names)}"
                raise TreeError(f"{origin}: unknown option {above}{part}; {hint}")
            kind = hints[part]
        elif get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
            if not re.fullmatch(r"\d{1,3}", part):
                raise TreeError(f"{origin}: {'.'.join(path)}: {path[depth - 1]} is a list; write [[{path[depth - 1]}]]")
            kind = get_args(kind)[0]
        elif get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
            kind = get_args(kind)[1]
        else:
            raise TreeError(f"{origin}: {'.'.join(path)}: {path[depth - 1]} is one value, not a section")


def _may_show(kind: Any, at: str) -> bool:
    """Whether nothing on the way to an option that exists is kept out of what is shown."""
    for part in at.split("."):
        kind = _inner(kind)
        if is_dataclass(kind):
            if not next(item.repr for item in fields(kind) if item.name == part):
                return False
            kind = get_type_hints(kind)[part]
        elif get_origin(kind) is not None:
            kind = get_args(kind)[-1 if issubclass(get_origin(kind), Mapping) else 0]
    return True


def _typed(kind: Any, value: Any, at: str = "") -> Any:
    """Numbered elements back to lists, "none" to None, and text with commas to a list where one is wanted."""
    kind = _inner(kind)
    if isinstance(value, dict) and get_origin(kind) is tuple:
        element = get_args(kind)[0]
        for index in range(len(value)):
            if str(index) not in value:
                raise TreeError(f"{at}.{max(value, key=int)} was set, but there is no {at}.{index}: number them from 0")
        return [_typed(element, value[key]) for key in sorted(value, key=int)]
    if isinstance(value, dict) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return {name: _typed(hints[name], item, f"{at}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, dict) and get_origin(kind) is not None:
        return {name: _typed(get_args(kind)[1], item) for name, item in value.items()}
    if isinstance(value, str) and value.lower() == "none":
        return None
    if isinstance(value, str) and get_origin(kind) is tuple:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _inner(kind: Any) -> Any:
    """The type behind an optional one."""
    if get_origin(kind) in (Union, UnionType):
        given = [part for part in get_args(kind) if part is not type(None)]
        return given[0] if len(given) == 1 else kind
    return kind
