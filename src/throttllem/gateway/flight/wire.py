"""Events of the core to and from JSON values, its commands to JSON, whatever fields they have.

The JSON names a value's class as "k", leaves out fields that hold their default, and keeps floats exactly. Knows
nothing of files, nor of what the values mean.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from throttllem.core.types import Command, Event

Reader = Callable[[object, str], Any]
_PLAIN = (int, float, str, bool)
_WORDS = types.MappingProxyType(
    {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
)
_EVENTS = types.MappingProxyType({kind.__name__: kind for kind in get_args(Event)})


class WireError(ValueError):
    """JSON that is no event of this build; the message names the field."""


def to_json(value: Event | Command) -> dict[str, object]:
    """One event or command as JSON, to be written by `dumps`."""
    return {"k": type(value).__name__, **_encoded(value)}


def event_from(data: object) -> Event:
    """The event that `to_json` wrote. Raises WireError for anything else."""
    if not isinstance(data, dict):
        raise WireError(f"event: {_short(data)} is not an object")
    name = data.get("k")
    if not isinstance(name, str) or name not in _EVENTS:
        raise WireError(f"event: {_short(name)} is none that this build knows ({', '.join(sorted(_EVENTS))})")
    event: Event = _built(_EVENTS[name], {key: value for key, value in data.items() if key != "k"}, name)
    return event


def dumps(value: object) -> str:
    """Compact JSON on one line; floats as `repr` gives them, numpy's numbers as Python's."""
    return _ENCODER.encode(value)


def _number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is nothing that JSON holds")


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=_number)


# ---- out -----------------------------------------------------------------------------------------------------


@cache
def _defaults(kind: type) -> tuple[tuple[str, object], ...]:
    return tuple((item.name, item.default) for item in fields(kind) if item.init)


def _encoded(value: Any) -> dict[str, object]:
    found: dict[str, object] = {}
    kind: Any = type(value)
    for name, default in _defaults(kind):
        item = getattr(value, name)
        if item is default or (default is not MISSING and type(item) is type(default) and item == default):
            continue
        found[name] = _encoded(item) if is_dataclass(item) else item
    return found


# ---- in ------------------------------------------------------------------------------------------------------


def _built(kind: type, data: object, where: str) -> Any:
    if not isinstance(data, dict):
        raise WireError(f"{where}: {_short(data)} is not an object")
    readers = _readers(kind)
    unknown = [key for key in data if key not in readers]
    if unknown:
        raise WireError(f"{where}: has no field {_short(unknown[0])} in this build")
    values = {name: readers[name](value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise WireError(f"{where}: {error}") from error


@cache
def _readers(kind: type) -> Mapping[str, Reader]:
    hints = get_type_hints(kind)
    return {name: _reader(hints[name]) for name, _ in _defaults(kind)}


def _reader(hint: Any) -> Reader:
    """How a field of that type is read; TypeError for a type that no event has yet."""
    if hint in _PLAIN:
        return lambda value, where: _plain(hint, value, where)
    if get_origin(hint) in (types.UnionType, Union) and type(None) in get_args(hint):
        (inner,) = (_reader(item) for item in get_args(hint) if item is not type(None))
        return lambda value, where: None if value is None else inner(value, where)
    if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
        element = _reader(get_args(hint)[0])
        return lambda value, where: tuple(element(item, where) for item in _checked(list, value, where))
    if is_dataclass(hint):
        return lambda value, where: _built(hint, value, where)  # type: ignore[arg-type]
    raise TypeError(f"{hint}: no JSON form is known for this type")


def _plain(kind: type, value: object, where: str) -> object:
    """Whole numbers stand for floats and stay whole, so that what is written again is the same."""
    if kind is float and type(value) is int:
        return value
    return _checked(kind, value, where)


def _checked(kind: type, value: object, where: str) -> Any:
    if type(value) is not kind:
        raise WireError(f"{where}: {_short(value)} is not {_WORDS[kind]}")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
