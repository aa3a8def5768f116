"""The known GPUs and models: frozen constants, each with its source beside it in `catalogue.toml` and `models.toml`.

A user's TOML file adds entries or replaces whole entries by name. Knows nothing of how the constants are used.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from throttllem.did_you_mean import did_you_mean
from throttllem.physics.checkpoints import named_by_figures, recognised
from throttllem.physics.huggingface import cached, read_model
from throttllem.physics.inheritance import FACTS, inherited
from throttllem.physics.laws import Basis, Fraction, Frozen, PowerLaw, TimeLaw, implausible
from throttllem.physics.model import Model

log = logging.getLogger("throttllem.physics")

T = TypeVar("T")
E = TypeVar("E", bound=Frozen)

_FLAGS = [name for name, field in Model.model_fields.items() if field.annotation is bool]


class UnknownName(ValueError):  # noqa: N818 - a plain name for users' code
    """No GPU or model of that name; the message lists similar names."""


class CatalogueError(ValueError):
    """A catalogue file that cannot be read; the message names file, key and fix."""


class Gpu(Frozen):
    """One kind of GPU. SI units unless the name has another unit."""

    name: str
    like: str | None = None
    """The GPU that lends the constants that this entry does not have; None: it has all of them."""
    nvml_names: tuple[str, ...] = ()
    """Its names as drivers report them, by which it is recognised."""
    compute_capability: str | None = Field(default=None, pattern=r"^[0-9]+\.[0-9]$")
    clock_min_mhz: PositiveInt
    clock_max_mhz: PositiveInt
    clock_step_mhz: PositiveInt
    memory_bytes: PositiveFloat
    memory_fraction: float = Fraction
    activation_bytes: NonNegativeFloat
    bandwidth_bytes_per_s: PositiveFloat
    peak_flop_per_s: PositiveFloat
    """Of bfloat16, dense (float16 on a GPU without it)."""
    peak_fp8_flop_per_s: PositiveFloat | None = None
    """Of 8-bit floats, dense; None: the GPU has none."""
    multiprocessors: PositiveInt | None = None
    startup_s: PositiveFloat
    startup_w: PositiveFloat
    time: TimeLaw
    power: PowerLaw
    time_basis: Basis
    power_basis: Basis
    origin: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """By basis, the constants that do not have that of their law: "measured", "modelled (inherited from ...)"."""

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

    def origin_of(self, constant: str) -> str:
        """The basis of a constant, such as "memory_bytes" or "power.idle_w": "datasheet", "measured", "calibrated",
        "modelled" or "modelled (inherited from NAME)".
        """
        for basis, constants in self.origin.items():
            if constant in constants:
                return basis
        if constant in FACTS or constant == "power.limit_w":
            return "datasheet"
        law = constant.partition(".")[0]
        return self.time_basis.kind if law == "time" else self.power_basis.kind if law == "power" else "modelled"

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
        gpus, models = _shipped()
        if extra is not None:
            more_gpus, more_models = _parse(_read(extra), str(extra), gpus)
            gpus, models = gpus | more_gpus, models | more_models
        return cls(gpus=gpus, models=models)

    def having(self, gpu: Gpu) -> Self:
        """With that GPU, which replaces one of the same name."""
        return self.model_copy(update={"gpus": {**self.gpus, gpu.name: gpu}})

    def gpu(self, name: str) -> Gpu:
        """The GPU of that name; UnknownName, with those that are known and the way out, otherwise."""
        if name not in self.gpus:
            known = sorted(self.gpus)
            near = did_you_mean(name, known, most=3)
            hint = near if near.startswith("known") else f"{near} Known are {', '.join(known)}"
            way = "`throttllem doctor` names the kind of a GPU that is here, or prints the entry to add"
            raise UnknownName(f"unknown GPU {name!r}: {hint}; {way}")
        return self.gpus[name]

    def model(self, name: str) -> Model:
        """The model of a catalogue name, of a checkpoint's name (`OWNER/NAME`) whose figures are known here or in the
        hub's cache on this machine, or of a `config.json` (the file or its folder).

        Raises UnknownName, and ConfigError (file, key, way out) for a file that cannot be read as a model.
        """
        found = self.models.get(name) or self.checkpoint(name)
        if found is not None:
            return found
        path = Path(name).expanduser()
        if not path.exists() and (name.startswith(("/", ".", "~")) or name.endswith(".json")):
            raise UnknownName(f"model {name!r}: no such file or folder; give a config.json, or the folder that has it")
        if not path.exists():
            hint = did_you_mean(name, sorted(self.models), most=3)
            raise UnknownName(f"unknown model {name!r}: {hint} (a config.json, the file or its folder, will do too)")
        return self._read(path, name)

    def checkpoint(self, name: str) -> Model | None:
        """The model of a checkpoint's name; None: it is not known. Raises ConfigError for a file that is broken."""
        found = recognised(name, self.models.values())
        if found is None and (file := cached(name)) is not None:
            return self._read(file, name)
        return found

    def reported(self, names: Iterable[str]) -> Model | None:
        """The model of what an engine says of itself (checkpoints and served names, the surest first): a known
        checkpoint, or a folder of this machine with a `config.json`; None: none of them is known. Raises ConfigError.
        """
        for name in names:
            if (found := self.checkpoint(name)) is not None:
                return found
            if name.startswith("/") and (file := Path(name, "config.json")).is_file():
                return self._read(file, name)
        return None

    def _read(self, path: Path, name: str) -> Model:
        """The model of a file; under the catalogue's name where that has one of the same figures, formats aside."""
        model, notes = read_model(path, name)
        for note in notes:
            log.warning("%s", note)
        known = named_by_figures(model, self.models.values())
        return model.model_copy(update={"name": known}) if known else model


@cache
def _shipped() -> tuple[dict[str, Gpu], dict[str, Model]]:
    """The entries that ship; not to be changed."""
    folder = resources.files("throttllem.physics")
    read = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("catalogue.toml", "models.toml")}
    gpus, _ = _parse(read["catalogue.toml"], "catalogue.toml", {})
    _, models = _parse(read["models.toml"], "models.toml", {})
    return gpus, models


def _lookup(entries: dict[str, T], name: str, what: str) -> T:
    if name not in entries:
        raise UnknownName(f"unknown {what} {name!r}: {did_you_mean(name, sorted(entries), most=3)}")
    return entries[name]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path}: cannot be read ({error}); give a UTF-8 TOML file") from error


def _parse(text: str, file: str, known: dict[str, Gpu]) -> tuple[dict[str, Gpu], dict[str, Model]]:
    """The entries of a file; those of GPUs may be like those in `known`."""
    try:
        tree = tomllib.loads(text)
    except ValueError as error:  # a number of thousands of digits is no TOMLDecodeError
        raise CatalogueError(f"{file}: not valid TOML: {error}") from error
    strange = sorted(set(tree) - {"gpu", "model"})
    if strange:
        raise CatalogueError(f"{file}: unknown key {strange[0]!r}: write tables [gpu.NAME] and [model.NAME]")
    gpus = dict[str, Gpu]()
    own = _tables(tree, "gpu", Gpu, file)
    for name in own:
        _resolve(name, own, gpus, known, file)
    models = {
        name: _entry(entry, f"model.{name}", name, Model, file)
        for name, entry in _tables(tree, "model", Model, file).items()
    }
    return {name: gpus[name] for name in own}, models


def _tables(tree: dict[str, Any], key: str, kind: type[Frozen], file: str) -> dict[str, dict[str, Any]]:
    table = tree.get(key, {})
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise CatalogueError(f"{file}: {key}: must hold tables, each written as [{key}.NAME]")
    for name, entry in table.items():
        if (whole := _cut_by_dots(name, entry, kind)) != name:
            raise CatalogueError(f'{file}: [{key}.{whole}]: a name with a dot needs quotes: write [{key}."{whole}"]')
        _check_figures(entry, f"{file}: {key}.{name}")
    return table


def _check_figures(value: object, where: str) -> None:
    """Raises CatalogueError for a figure that is in another unit, or true or false."""
    name = where.rpartition(".")[2]
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_figures(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            _check_figures(inner, where)
    elif isinstance(value, bool):
        if name not in _FLAGS:
            raise CatalogueError(f"{where}: must be a number or a text, not {str(value).lower()}")
    elif isinstance(value, int | float) and (must := implausible(name, value)):
        raise CatalogueError(f"{where}: {str(value)[:20]}: {must}")


def _cut_by_dots(name: str, entry: dict[str, Any], kind: type[Frozen]) -> str:
    """The name that was meant: TOML makes tables within tables of a name with dots."""
    for part, inner in entry.items():
        if isinstance(inner, dict) and part not in kind.model_fields:
            return _cut_by_dots(f"{name}.{part}", inner, kind)
    return name


def _resolve(
    name: str,
    own: dict[str, dict[str, Any]],
    done: dict[str, Gpu],
    known: dict[str, Gpu],
    file: str,
    by: tuple[str, ...] = (),
) -> Gpu:
    """The GPU of an entry, after the one that it is like: of the same file, or one in `known`."""
    if name in done:
        return done[name]
    entry, key = own[name], f"gpu.{name}"
    if "like" in entry:
        like = str(entry["like"])
        if like in own and like not in (*by, name):
            lender = _resolve(like, own, done, known, file, (*by, name))
        elif like in known:
            lender = known[like]
        else:
            near = did_you_mean(like, sorted({*own, *known} - {*by, name}), most=3)
            problem = "is like this entry itself" if like in (*by, name) else "no GPU has that name"
            raise CatalogueError(f"{file}: {key}.like: {like!r}: {problem}; {near}")
        entry = _inherited(lender, entry, key, file)
    done[name] = _entry(entry, key, name, Gpu, file)
    return done[name]


def _inherited(like: Gpu, entry: dict[str, Any], key: str, file: str) -> dict[str, Any]:
    """Raises CatalogueError for facts by which nothing can be scaled."""
    for table in ("time", "power", "origin"):
        if not isinstance(entry.get(table, {}), dict):
            raise CatalogueError(f"{file}: {key}.{table}: must be a table")
    for basis, constants in entry.get("origin", {}).items():
        if not (isinstance(constants, list) and all(isinstance(constant, str) for constant in constants)):
            raise CatalogueError(f'{file}: {key}.origin.{basis}: must be a list of constants, such as ["power.idle_w"]')
    facts = entry | entry.get("power", {})
    for fact in (*FACTS, "limit_w"):
        if fact in facts and not (isinstance(facts[fact], int | float) and facts[fact] > 0):
            raise CatalogueError(f"{file}: {key}.{fact}: must be a number above 0")
    return inherited(like, entry)


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
        return (
            'missing; add it (the shipped catalogue.toml shows every key), or take it from another GPU: like = "NAME"'
        )
    if kind == "extra_forbidden":
        return "unknown key; remove it or correct its spelling"
    return message
