"""The known GPUs and models: frozen constants, each with its source beside it in `catalogue.toml`.

A user's TOML file adds entries or replaces whole entries by name. Knows nothing of how the constants are used.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from throttllem.did_you_mean import did_you_mean
from throttllem.physics.laws import Basis, Fraction, Frozen, PowerLaw, TimeLaw
from throttllem.physics.model import Model

T = TypeVar("T")
E = TypeVar("E", bound=Frozen)


class UnknownName(ValueError):  # noqa: N818 - a plain name for users' code
    """No GPU or model of that name; the message lists similar names."""


class CatalogueError(ValueError):
    """A catalogue file that cannot be read; the message names file, key and fix."""


class Gpu(Frozen):
    """One kind of GPU. SI units unless the name has another unit."""

    name: str
    clock_min_mhz: PositiveInt
    clock_max_mhz: PositiveInt
    clock_step_mhz: PositiveInt
    memory_bytes: PositiveFloat
    memory_fraction: float = Fraction
    activation_bytes: NonNegativeFloat
    bandwidth_bytes_per_s: PositiveFloat
    peak_flop_per_s: PositiveFloat
    startup_s: PositiveFloat
    startup_w: PositiveFloat
    time: TimeLaw
    power: PowerLaw
    time_basis: Basis
    power_basis: Basis

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        steps, rest = divmod(self.clock_max_mhz - self.clock_min_mhz, self.clock_step_mhz)
        if steps < 1 or rest:
            raise ValueError("clock_max_mhz must be clock_min_mhz plus a positive number of clock_step_mhz")
        if self.power.knee_mhz >= self.clock_max_mhz:
            raise ValueError("power.knee_mhz must be below clock_max_mhz")
        if self.power.idle_w + self.power.static_w >= self.power.limit_w:
            raise ValueError("power.idle_w + power.static_w must be below power.limit_w")
        return self

    @property
    def clocks_mhz(self) -> tuple[int, ...]:
        """Every clock that can be set, ascending."""
        return tuple(range(self.clock_min_mhz, self.clock_max_mhz + 1, self.clock_step_mhz))


class Catalogue(Frozen):
    """GPUs and models by name."""

    gpus: dict[str, Gpu]
    models: dict[str, Model]

    @classmethod
    def load(cls, extra: Path | None = None) -> Self:
        """The shipped catalogue, with the entries of a user's TOML file added, or replacing those of the same name.

        Raises CatalogueError (file, key, fix) for a file that is missing, is not TOML, or has an invalid entry.
        """
        shipped = resources.files("throttllem.physics").joinpath("catalogue.toml").read_text(encoding="utf-8")
        gpus, models = _parse(shipped, "catalogue.toml")
        if extra is not None:
            more_gpus, more_models = _parse(_read(extra), str(extra))
            gpus, models = gpus | more_gpus, models | more_models
        return cls(gpus=gpus, models=models)

    def gpu(self, name: str) -> Gpu:
        """The GPU of that name; UnknownName otherwise."""
        return _lookup(self.gpus, name, "GPU")

    def model(self, name: str) -> Model:
        """The model of that name; UnknownName otherwise."""
        return _lookup(self.models, name, "model")


def _lookup(entries: dict[str, T], name: str, what: str) -> T:
    if name not in entries:
        raise UnknownName(f"unknown {what} {name!r}: {did_you_mean(name, sorted(entries), most=3)}")
    return entries[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path}: cannot be read ({error}); give a UTF-8 TOML file") from error


def _parse(text: str, file: str) -> tuple[dict[str, Gpu], dict[str, Model]]:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{file}: not valid TOML: {error}") from error
    strange = sorted(set(tree) - {"gpu", "model"})
    if strange:
        raise CatalogueError(f"{file}: unknown key {strange[0]!r}: write tables [gpu.NAME] and [model.NAME]")
    return _entries(tree, "gpu", Gpu, file), _entries(tree, "model", Model, file)


def _entries(tree: dict[str, Any], key: str, kind: type[E], file: str) -> dict[str, E]:
    table = tree.get(key, {})
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise CatalogueError(f"{file}: {key}: must hold tables, each written as [{key}.NAME]")
    return {name: _entry(entry, f"{key}.{name}", name, kind, file) for name, entry in table.items()}


def _entry(values: dict[str, Any], key: str, name: str, kind: type[E], file: str) -> E:
    if "name" in values:
        raise CatalogueError(f"{file}: {key}.name: leave it out; the table's own name is the name")
    try:
        return kind.model_validate({"name": name, **values})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *(str(part) for part in first["loc"])])
        raise CatalogueError(f"{file}: {where}: {_fix(first['type'], first['msg'])}") from error


def _fix(kind: str, message: str) -> str:
    if kind == "missing":
        return "missing; add it (the shipped catalogue.toml shows every key)"
    if kind == "extra_forbidden":
        return "unknown key; remove it or correct its spelling"
    return message
