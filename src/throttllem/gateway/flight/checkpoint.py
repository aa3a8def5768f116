"""A controller as bytes, and back, without trusting the bytes.

Python's pickle does the walking, for shared objects and cycles; but every object of ours is taken apart into plain
values, and only the few callables below can be named when it is put together again. So a checkpoint from a stranger can
make objects of the core and numbers, and run nothing. Performance tables are left out: they are named by their digest.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import pickle
import pickletools
import re
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from types import FunctionType, MappingProxyType
from typing import Any

import numpy as np

from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.profiling.storage import ARRAYS, TableFileError

_PROTOCOL = 4
_CORE = re.compile(r"(throttllem\.core(?:\.[a-z_]+)+):([A-Za-z_]\w*)")
_DIGEST = re.compile(r"([0-9a-f]{16})(?:@(\d{1,5}))?")
_OPCODES = re.compile(
    "PROTO|FRAME|STOP|MARK|POP|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG[14]|BINFLOAT|(SHORT_)?BINUNICODE|BINUNICODE8|"
    "(SHORT_)?BINBYTES|BINBYTES8|EMPTY_(LIST|TUPLE|DICT|SET)|APPENDS?|TUPLE[123]?|SETITEMS?|ADDITEMS|FROZENSET|MEMOIZE|"
    "(LONG_)?BINGET|BINPERSID|STACK_GLOBAL|REDUCE"
)
_ARRAY_KINDS = "biuf"
_GENERIC = ("builtins", "typing", "abc")


class CheckpointError(ValueError):
    """A controller that cannot be written, or bytes that are none of this build's; the message says why."""


def table_digest(table: PerformanceTable) -> str:
    """16 hex digits over everything that decisions take from a table."""
    clocks, hull = [int(mhz) for mhz in table.clocks_mhz], {name: int(n) for name, n in asdict(table.hull).items()}
    digest = hashlib.sha256(repr((clocks, hull)).encode())
    for name in ARRAYS:
        part = getattr(table, name)
        digest.update(repr((name, part.dtype.str, part.shape)).encode())
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def save(controller: Controller, digest_of: Callable[[PerformanceTable], str]) -> bytes:
    """The whole state of a controller. Raises CheckpointError if it holds what cannot be written."""
    file = io.BytesIO()
    try:
        _Pickler(file, digest_of).dump(controller)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the controller cannot be written down: {error}") from error
    return file.getvalue()


def load(data: bytes, table: Callable[[str], PerformanceTable]) -> Controller:
    """The controller that `save` wrote; `table` finds a performance table by its digest.

    Raises CheckpointError for anything else; errors of `table` pass unchanged.
    """
    try:
        _check_opcodes(data)
        found = _Unpickler(io.BytesIO(data), table).load()
    except (CheckpointError, TableFileError):
        raise
    except Exception as error:  # bytes of a stranger can fail in any way; none of them has run anything
        raise CheckpointError(f"the checkpoint is damaged, or of another build: {error}") from error
    if type(found) is not Controller:
        raise CheckpointError(f"the checkpoint holds a {type(found).__name__}, not a controller")
    return found


# ---- taking apart --------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Writes plain containers as pickle does, everything else as calls of the callables at the end of this file."""

    def __init__(self, file: io.BytesIO, digest_of: Callable[[PerformanceTable], str]) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self._digest_of = digest_of

    def persistent_id(self, obj: Any) -> str | None:
        """Tables are kept elsewhere; one whose clocks are held down is written as "digest@MHz" of the whole one."""
        if not isinstance(obj, PerformanceTable):
            return None
        return self._digest_of(obj) if obj.base is None else f"{self._digest_of(obj.base)}@{obj.limit_mhz}"

    def reducer_override(self, obj: Any) -> Any:
        """How one object is made again: callable, arguments, and state for `fill`."""
        kind = type(obj)
        if kind in (deque, OrderedDict) or (kind in (FunctionType, type) and obj in _ALLOWED.values()):
            return NotImplemented
        if kind is np.ndarray and obj.dtype.kind in _ARRAY_KINDS:
            return make_array, (obj.dtype.str, obj.shape, obj.tobytes())
        if isinstance(obj, np.generic) and obj.dtype.kind in _ARRAY_KINDS:
            return make_scalar, (obj.dtype.str, obj.tobytes())
        if kind is array:
            return make_series, (obj.typecode, obj.tobytes())
        if kind is MappingProxyType:
            return make_proxy, (dict(obj),)
        if kind is not type and kind.__module__.startswith("throttllem.core."):
            return _taken_apart(obj, kind)
        raise pickle.PicklingError(f"{kind.__module__}.{kind.__qualname__} is nothing that a checkpoint may hold")


def _taken_apart(obj: Any, kind: type) -> Any:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if isinstance(obj, Enum):
        return make_member, (name, obj.value)
    if kind.__mro__[1:] == (tuple, object):
        return make_tuple, (name, list(obj))
    foreign = [base for base in kind.__mro__ if not base.__module__.startswith(("throttllem.core.", *_GENERIC))]
    if foreign or any(issubclass(kind, base) for base in (tuple, list, dict, set, BaseException)):
        raise pickle.PicklingError(f"{name} is built on a class that a checkpoint may not hold")
    return make_blank, (name,), _state(obj, kind), None, None, fill


def _state(obj: Any, kind: type) -> dict[str, object]:
    state = {name: getattr(obj, name) for name in _slots(kind) if hasattr(obj, name)}
    return state | getattr(obj, "__dict__", {})


def _slots(kind: type) -> list[str]:
    slots = (cls.__dict__.get("__slots__", ()) for cls in reversed(kind.__mro__))
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    return [name for name in names if not name.startswith("__")]


# ---- putting together ----------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Knows the callables at the end of this file, and two containers."""

    def __init__(self, file: io.BytesIO, table: Callable[[str], PerformanceTable]) -> None:
        super().__init__(file)
        self._table = table
        self._tables: dict[str, PerformanceTable] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The only names that a pickle may speak."""
        found = _ALLOWED.get((module, name))
        if found is None:
            raise CheckpointError(f"the checkpoint names {module}.{name}, which is not allowed: refused")
        return found

    def persistent_load(self, pid: Any) -> PerformanceTable:
        """A table by its digest, the same object each time."""
        match = _DIGEST.fullmatch(pid) if isinstance(pid, str) else None
        if match is None:
            raise CheckpointError("the checkpoint names a table by what is no digest: refused")
        digest, limit_mhz = match.groups()
        if digest not in self._tables:
            self._tables[digest] = self._table(digest)
        return self._tables[digest].capped(None if limit_mhz is None else int(limit_mhz))


def _core_class(name: str) -> type:
    match = _CORE.fullmatch(name)
    if match is None:
        raise CheckpointError(f"the checkpoint names {name!r}, which is not of the core: refused")
    try:
        found = getattr(importlib.import_module(match[1]), match[2])
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint holds a {match[2]}, which this build does not have") from error
    if not isinstance(found, type) or found.__module__ != match[1]:
        raise CheckpointError(f"the checkpoint names {name!r}, which is no class of the core: refused")
    return found


def _check_opcodes(data: bytes) -> None:
    """Refuse what `save` never writes: BUILD above all, which sets attributes of whatever is at hand."""
    for opcode, _, _ in pickletools.genops(data):
        if not _OPCODES.fullmatch(opcode.name):
            raise CheckpointError(f"the checkpoint uses {opcode.name}, which is not allowed: refused")


# ---- what a checkpoint may call ------------------------------------------------------------------------------


def make_blank(name: str) -> Any:
    """An object of a class of the core, with no field set."""
    return object.__new__(_core_class(name))


def make_tuple(name: str, values: list[Any]) -> Any:
    """A named tuple of the core."""
    kind = _core_class(name)
    if not issubclass(kind, tuple):
        raise CheckpointError(f"{name} is no named tuple")
    return tuple.__new__(kind, values)


def fill(obj: Any, state: Mapping[str, object]) -> None:
    """Set an object's fields; fields that this build has added get their defaults."""
    kind = type(obj)
    _core_class(f"{kind.__module__}:{kind.__qualname__}")
    if isinstance(obj, Enum | type | PerformanceTable):
        raise CheckpointError(f"the checkpoint sets fields of a {kind.__name__}, which all share: refused")
    slots = _slots(kind)
    for name, value in state.items():
        # What is no slot goes beside the class, where it must hide nothing of it.
        if name.startswith("__") or (name not in slots and hasattr(kind, name)):
            raise CheckpointError(f"the checkpoint sets {name!r}: refused")
        object.__setattr__(obj, name, value)
    if is_dataclass(kind):
        for item in fields(kind):
            if item.name not in state and item.default is not MISSING:
                object.__setattr__(obj, item.name, item.default)
            elif item.name not in state and item.default_factory is not MISSING:
                object.__setattr__(obj, item.name, item.default_factory())


def make_member(name: str, value: object) -> Enum:
    """A member of an enumeration of the core."""
    kind = _core_class(name)
    if not issubclass(kind, Enum):
        raise CheckpointError(f"{name} has no members")
    return kind(value)


def _dtype(text: str) -> np.dtype[Any]:
    if not re.fullmatch(rf"[<>|=][{_ARRAY_KINDS}]\d{{1,2}}", text):
        raise CheckpointError(f"the checkpoint holds numbers of type {text!r}: refused")
    return np.dtype(text)


def make_array(dtype: str, shape: tuple[int, ...], data: bytes) -> Any:
    """An array of plain numbers."""
    return np.frombuffer(data, _dtype(dtype)).reshape(shape).copy()


def make_scalar(dtype: str, data: bytes) -> Any:
    """One of numpy's numbers."""
    return np.frombuffer(data, _dtype(dtype))[0]


def make_series(typecode: str, data: bytes) -> array[Any]:
    """Numbers in Python's own array."""
    return array(typecode, data)


def make_proxy(values: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    """A mapping that cannot be written to."""
    return MappingProxyType(values)


_MAKERS = (make_blank, make_member, make_tuple, make_array, make_scalar, make_series, make_proxy, fill)
_ALLOWED = MappingProxyType(
    {
        **{(__name__, maker.__name__): maker for maker in _MAKERS},
        ("collections", "deque"): deque,
        ("collections", "OrderedDict"): OrderedDict,
    }
)
