"""Values of the core to and from JSON: events and commands, options, and the state of a controller.

Dataclasses become objects, by whatever fields they have; floats are exact. What is read is built by the type of each
field and nothing else, so a record from an unknown source can hold wrong numbers but run nothing. Knows nothing of
files, nor of what the values mean.
"""

from __future__ import annotations

import base64
import binascii
import json
import types
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.lengths.online import OnlineLengthPredictor, OnlineMemory
from throttllem.core.lengths.prediction import LengthPredictor, MaxTokens, Noisy, Oracle
from throttllem.core.scoreboard import Scoreboard, ScoreboardState, SequenceState
from throttllem.core.types import Command, Event, Request, Stepped

TableName = Callable[[PerformanceTable], str]
"""The name that stands for a performance table."""
Tables = Callable[[str], PerformanceTable]
"""The performance table of a name; its errors pass unchanged."""
Reader = Callable[[object, str, Tables], Any]

_PLAIN = (int, float, str, bool, type(None))
_NAMES = types.MappingProxyType(
    {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object"}
)
_EVENTS = types.MappingProxyType({kind.__name__: kind for kind in get_args(Event)})
_MOST = 1 << 53
_TOKENS = (0, 1 << 31)
_COUNTS: Mapping[type, Mapping[str, tuple[int, int]]] = types.MappingProxyType(
    {
        Request: {"prompt_tokens": _TOKENS, "max_tokens": _TOKENS, "sequences": (1, _MOST), "prompts": (1, _MOST)},
        SequenceState: {"done_tokens": _TOKENS, "output_tokens": _TOKENS, "expected_tokens": _TOKENS},
        Stepped: {"iteration": (0, _MOST)},
    }
)
"""Bounds of counts that compiled loops add up, and index by, without asking."""
_PREDICTORS = types.MappingProxyType({kind.__name__: kind for kind in (Oracle, Noisy, MaxTokens)})
_ONLINE = OnlineLengthPredictor.__name__


class WireError(ValueError):
    """JSON that holds no such value of this build, or a value that JSON cannot hold; the message names the field."""


def to_json(value: Event | Command) -> dict[str, object]:
    """One event or command as JSON, to be written by `dumps`: its class as "k", fields at their default left out."""
    return {"k": type(value).__name__, **_brief(value)}


def event_from(data: object) -> Event:
    """The event that `to_json` wrote. Raises WireError for anything else."""
    if not isinstance(data, dict):
        raise WireError(f"event: {_short(data)} is not an object")
    name = data.get("k")
    if not isinstance(name, str) or name not in _EVENTS:
        raise WireError(f"event: {_short(name)} is none that this build knows ({', '.join(sorted(_EVENTS))})")
    event: Event = _built(_EVENTS[name], {key: value for key, value in data.items() if key != "k"}, name, _no_tables)
    return event


def plain(value: object, table_name: TableName) -> Any:
    """A value of the core as JSON can hold it, with every field, and nothing of it shared with the value.

    Raises WireError for what it cannot hold.
    """
    found: Any
    match value:
        case None | int() | float() | str():
            found = value
        case np.generic():
            found = value.item()
        case np.ndarray() if value.dtype == np.float32:
            found = base64.b64encode(value.astype("<f4").tobytes()).decode()
        case np.ndarray():
            found = value.tolist()
        case Mapping():
            found = {str(key): plain(item, table_name) for key, item in value.items()}
        case list() | tuple() | deque():
            found = [item if type(item) in _PLAIN else plain(item, table_name) for item in value]
        case PerformanceTable():
            found = table_name(value)
        case Scoreboard():
            found = plain(value.state(), table_name)
        case OnlineLengthPredictor():
            found = {"k": _ONLINE} | plain(value.memory(), table_name)
        case _:
            found = _whole(value, table_name)
    return found


def _whole(value: object, table_name: TableName) -> dict[str, object]:
    """All fields of a dataclass of the core; with its class as "k", if it is a predictor."""
    kind: Any = type(value)
    if not is_dataclass(value) or not kind.__module__.startswith("throttllem.core."):
        raise WireError(f"a {kind.__qualname__} of {kind.__module__} cannot be recorded")
    held = {name: getattr(value, name) for name, _ in _defaults(kind)}
    found = {name: item if type(item) in _PLAIN else plain(item, table_name) for name, item in held.items()}
    return {"k": kind.__name__, **found} if kind in _PREDICTORS.values() else found


def built(kind: type, data: object, where: str, tables: Tables) -> Any:
    """The value of a dataclass of the core that `plain` wrote. Raises WireError for anything else."""
    return _built(kind, data, where, tables)


def dumps(value: object) -> str:
    """Compact JSON on one line; floats as `repr` gives them, numpy's numbers as Python's."""
    return _ENCODER.encode(value)


def _number(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is nothing that JSON holds")


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=_number)


@cache
def _defaults(kind: type) -> tuple[tuple[str, object], ...]:
    """The fields that a dataclass is built from, and their defaults."""
    return tuple((item.name, item.default) for item in fields(kind) if item.init)


def _brief(value: Any) -> dict[str, object]:
    """The fields that do not hold their default."""
    found: dict[str, object] = {}
    kind: Any = type(value)
    for name, default in _defaults(kind):
        item = getattr(value, name)
        if item is default or (default is not MISSING and type(item) is type(default) and item == default):
            continue
        found[name] = _brief(item) if is_dataclass(item) else item
    return found


# ---- in ------------------------------------------------------------------------------------------------------


def _built(kind: type, data: object, where: str, tables: Tables) -> Any:
    if not isinstance(data, dict):
        raise WireError(f"{where}: {_short(data)} is not an object")
    readers = _readers(kind)
    unknown = [key for key in data if key not in readers]
    if unknown:
        raise WireError(f"{where}: has no field {_short(unknown[0])} in this build")
    values = {name: readers[name](value, f"{where}.{name}", tables) for name, value in data.items()}
    for name, (least, most) in _COUNTS.get(kind, {}).items():
        count = values.get(name)
        if count is not None and not least <= count <= most:
            raise WireError(f"{where}.{name}: {count} is not between {least} and {most}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise WireError(f"{where}: {error}") from error


@cache
def _readers(kind: type) -> Mapping[str, Reader]:
    hints = get_type_hints(kind)
    return {name: _reader(hints[name]) for name, _ in _defaults(kind)}


def _reader(hint: Any) -> Reader:
    """How a field of that type is read; TypeError for a type that has no JSON form here."""
    special = _SPECIAL.get(hint)
    if special is not None:
        return special
    if hint in _PLAIN:
        return lambda value, where, tables: _plain(hint, value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return lambda value, where, tables: _called(hint, value, where)
    if is_dataclass(hint):
        return lambda value, where, tables: _built(hint, value, where, tables)  # type: ignore[arg-type]
    return _container_reader(hint)


def _container_reader(hint: Any) -> Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return _union_reader(arguments)
    if origin is np.ndarray:
        dtype = get_args(arguments[1])[0]
        return lambda value, where, tables: _array(dtype, value, where)
    if origin is tuple and arguments[-1] is not Ellipsis:
        each = [_reader(item) for item in arguments]
        return lambda value, where, tables: tuple(
            read(item, where, tables) for read, item in zip(each, _list(value, where, len(each)), strict=True)
        )
    if origin in (tuple, deque):
        element = _reader(arguments[0])
        return lambda value, where, tables: origin(element(item, where, tables) for item in _list(value, where))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, read = arguments[0], _reader(arguments[1])
        return lambda value, where, tables: {
            _called(key, name, where): read(item, f"{where}.{name}", tables)
            for name, item in _checked(dict, value, where).items()
        }
    raise TypeError(f"{hint}: no JSON form is known for this type")


def _union_reader(arguments: tuple[Any, ...]) -> Reader:
    """One type or None, or any of several plain types."""
    if type(None) in arguments:
        (inner,) = (_reader(item) for item in arguments if item is not type(None))
        return lambda value, where, tables: None if value is None else inner(value, where, tables)
    if not all(item in _PLAIN for item in arguments):
        raise TypeError(f"{arguments}: no JSON form is known for this union")

    def read(value: object, where: str, tables: Tables) -> object:
        return _checked(type(value) if type(value) in arguments else arguments[0], value, where)

    return read


def _plain(kind: type, value: object, where: str) -> object:
    """Whole numbers stand for floats and stay whole, so that what is written again is the same."""
    if kind is float and type(value) is int:
        return value
    return _checked(kind, value, where)


def _checked(kind: type, value: object, where: str) -> Any:
    if type(value) is not kind:
        raise WireError(f"{where}: {_short(value)} is not {_NAMES[kind]}")
    return value


def _list(value: object, where: str, length: int | None = None) -> list[object]:
    found: list[object] = _checked(list, value, where)
    if length is not None and len(found) != length:
        raise WireError(f"{where}: {_short(value)} does not hold {length} values")
    return found


def _called(kind: Callable[[Any], Any], value: object, where: str) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise WireError(f"{where}: {error}") from error


def _array(dtype: Any, value: object, where: str) -> np.ndarray[Any, Any]:
    """An array of one dimension; single precision is in base64."""
    try:
        if dtype is np.float32:
            return np.frombuffer(base64.b64decode(_checked(str, value, where), validate=True), "<f4").copy()
        return np.array([_plain(type(item), item, where) for item in _list(value, where)], dtype=dtype)
    except (binascii.Error, ValueError, TypeError, KeyError, OverflowError) as error:
        raise WireError(f"{where}: holds no numbers ({error})") from error


def _predictor(value: object, where: str, tables: Tables) -> LengthPredictor:
    data = dict(_checked(dict, value, where))
    name = data.pop("k", None)
    if name == _ONLINE:
        return OnlineLengthPredictor.from_memory(_built(OnlineMemory, data, where, tables))
    if name not in _PREDICTORS:
        raise WireError(f"{where}: {_short(name)} is no predictor that this build knows")
    predictor: LengthPredictor = _built(_PREDICTORS[name], data, where, tables)
    return predictor


def _board(value: object, where: str, tables: Tables) -> Scoreboard:
    return Scoreboard.from_state(_built(ScoreboardState, value, where, tables))


def _table(value: object, where: str, tables: Tables) -> PerformanceTable:
    return tables(_checked(str, value, where))


def _no_tables(name: str) -> PerformanceTable:
    raise WireError(f"{name}: no event holds a performance table")


_SPECIAL: Mapping[Any, Reader] = types.MappingProxyType(
    {LengthPredictor: _predictor, Scoreboard: _board, PerformanceTable: _table}
)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
