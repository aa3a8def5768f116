"""The data sheet of a GPU that the catalogue lacks: a few figures in the entry of a similar GPU.

Inherited constants scale with them (`physics/inheritance.py`). Knows nothing of measurements.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from throttllem.did_you_mean import did_you_mean
from throttllem.physics.catalogue import Gpu
from throttllem.physics.inheritance import FACTS, POWER_FACTS, inherited

KEYS = (*FACTS, *POWER_FACTS)


def with_datasheet(like: Gpu, settings: Iterable[str]) -> Gpu:
    """`like` with every `key=value` applied. Raises ValueError (what, and what to do) for impossible figures."""
    sheet = dict(_parsed(setting) for setting in settings)
    if not sheet:
        return like
    bases = {"time_basis": like.time_basis, "power_basis": like.power_basis}
    try:
        return Gpu.model_validate({"name": like.name, **inherited(like, sheet | bases)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"--sheet {where}: {first['msg']}; give all figures that depend on each other") from error


def _parsed(setting: str) -> tuple[str, float]:
    key, equals, text = (part.strip() for part in setting.partition("="))
    if not equals or key not in KEYS:
        raise ValueError(f"--sheet {setting!r}: write key=value; {did_you_mean(key, KEYS, most=2)}")
    try:
        return key, float(text)
    except ValueError as error:
        raise ValueError(f"--sheet {setting!r}: {text!r} is not a number") from error
