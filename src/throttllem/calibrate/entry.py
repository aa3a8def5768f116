"""A calibrated GPU as a catalogue file: every key, and beside each constant its origin and uncertainty.

The text is parsed and validated before the file is written. Knows nothing of how constants were found.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from throttllem.calibrate.calibration import Calibration
from throttllem.calibrate.errors import Score, percent
from throttllem.calibrate.fit import Fitted
from throttllem.calibrate.points import Point
from throttllem.calibrate.prior import around, priors
from throttllem.files import write_aside
from throttllem.physics.catalogue import Gpu
from throttllem.physics.laws import Basis
from throttllem.physics.model import Model

_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
_AT_EDGE = 1e-3
_COMMENT_COLUMN = 48
_DATA_SHEET = ("memory_bytes", "bandwidth_bytes_per_s", "peak_flop_per_s", "power.limit_w")


def check_name(name: str) -> str:
    """The name, if TOML takes it without quotes; ValueError otherwise."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name {printable(name)}: a GPU's name is made of letters, digits, - and _, 80 at most")
    return name


def basis(points: Sequence[Point], model: str, source: str) -> Basis:
    """The range that a profile covers: its clocks, sizes, batches, mean contexts and model."""
    clocks = [point.clock_mhz for point in points]
    contexts = [point.kv_tokens / point.decode_batch for point in points if point.decode_batch]
    return Basis(
        kind="calibrated",
        source=source,
        clock_min_mhz=min(clocks),
        clock_max_mhz=max(clocks),
        tp=tuple(sorted({point.tp for point in points})),
        batch_max=max(point.batch for point in points),
        models=(model,),
        context_max_tokens=max(1, round(max(contexts))) if contexts else None,
        prefill_max_tokens=max(point.prefill_tokens for point in points),
    )


def entry(calibration: Calibration, name: str, covered: Basis, model: Model | None = None) -> str:
    """The TOML text, with `model` beside the GPU if that model is not a shipped one.

    Raises ValueError if the fitted constants are no possible GPU.
    """
    bases = {"time_basis": covered, "power_basis": covered}
    for score in calibration.scores:
        if "clock" in score.held_out:
            found = {"time_basis": score.seconds.median, "power_basis": score.watts.median}
            bases = {key: covered.model_copy(update={"median_error": round(off, 3)}) for key, off in found.items()}
    own = {"name": name, "like": None, "origin": _origin(calibration)}
    gpu = calibration.gpu.model_copy(update=own | bases)
    text = "\n".join([*_heading(calibration, covered), "", *_tables(gpu, calibration), *_model(model)]) + "\n"
    try:
        Gpu.model_validate({"name": name, **tomllib.loads(text)["gpu"][name]})
    except ValidationError as error:
        raise ValueError(
            f"the fitted constants are no possible GPU ({error.errors()[0]['msg']}); nothing was written. "
            f"Is {calibration.like} near enough to it (--like)?"
        ) from error
    return text


def write_entry(text: str, path: Path) -> None:
    """Whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def origin(gpu: Gpu, path: str, like: str) -> str:
    """Where a key that was not fitted comes from; `gpu` has it from `like`."""
    every = priors(gpu)
    if path in _DATA_SHEET or path.startswith("clock_"):
        return f"data sheet, from {like}"
    if path not in every:
        return f"not fitted, from {like}"
    if absent(gpu, path):
        return f"0 in {like}: that effect is not fitted"
    return f"from {like}: this profile does not determine it"


def absent(gpu: Gpu, path: str) -> bool:
    """Whether a constant is not fitted because the GPU lacks its effect."""
    return not around(gpu, [path], gpu)


def verdict(fitted: Fitted, like: str) -> str:
    """The comment of a fitted constant."""
    where = "" if not _at_edge(fitted) else ", at the bound of its range"
    if fitted.determined:
        return f"fitted, +- {fitted.error:.1%}{where}"
    return f"fitted, +- {fitted.error:.0%}{where}: determined only together with others, starting from {like}"


def printable(text: str) -> str:
    """Without characters that would break a line or a file."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _at_edge(fitted: Fitted) -> bool:
    constant = fitted.constant
    return fitted.value <= constant.low * (1 + _AT_EDGE) or fitted.value >= constant.high * (1 - _AT_EDGE)


def _heading(calibration: Calibration, covered: Basis) -> Iterator[str]:
    yield f"# {printable(covered.source)}; {printable(', '.join(covered.models))}."
    yield "# Written by `throttllem calibrate`; docs/calibrate.md explains it. Use it with --catalogue."
    yield "# Relative errors (median, p90, worst) by what was held out of the fit:"
    for score in calibration.scores:
        yield f"#   {score.held_out + ':':40} seconds {_three(score, 'seconds')}; watts {_three(score, 'watts')}"
    yield "# Values from another GPU are its data sheet and its fit: correct those that you know better."
    for warning in calibration.warnings:
        yield f"# WARNING: {printable(warning)}"


def _three(score: Score, what: str) -> str:
    errors = score.seconds if what == "seconds" else score.watts
    return ", ".join(percent(each) for each in (errors.median, errors.p90, errors.worst))


def _origin(calibration: Calibration) -> dict[str, tuple[str, ...]]:
    """The basis of the constants of a law that were not fitted."""
    gpu, fitted = calibration.gpu, {one.constant.path for one in calibration.fitted}
    found = dict[str, tuple[str, ...]]()
    for law in ("time", "power"):
        for key in type(getattr(gpu, law)).model_fields:
            path = f"{law}.{key}"
            basis = gpu.origin_of(path)
            if path not in fitted and basis != "datasheet":
                basis = basis if " (" in basis else f"{basis} (from {calibration.like})"
                found[basis] = (*found.get(basis, ()), path)
    return found


def _tables(gpu: Gpu, calibration: Calibration) -> Iterator[str]:
    """The GPU's own keys, then a table for each group of them."""
    fitted = {one.constant.path: one for one in calibration.fitted}
    entries = gpu.model_dump(exclude={"name"}, exclude_none=True)
    tables = {key: value for key, value in entries.items() if isinstance(value, Mapping)}
    yield f"[gpu.{gpu.name}]"
    for key, value in entries.items():
        if key not in tables and value != ():
            yield _line(key, value, origin(gpu, key, calibration.like))
    for table, values in tables.items():
        yield f"\n[gpu.{gpu.name}.{table}]"
        for key, value in values.items():
            if value == ():
                continue
            path = f"{table}.{key}"
            one = fitted.get(path)
            if table in ("time_basis", "power_basis", "origin"):
                comment = ""
            else:
                comment = verdict(one, calibration.like) if one else origin(gpu, path, calibration.like)
            yield _line(key, value, comment, rounded=one is not None)


def _model(model: Model | None) -> Iterator[str]:
    if model is None:
        return
    table = f"model.{model.name if _NAME.fullmatch(model.name) else json.dumps(model.name)}"
    yield f"\n[{table}]"
    parts: dict[str, Mapping[str, object]] = {}
    for key, value in model.model_dump(mode="json", exclude={"name"}, exclude_defaults=True).items():
        if isinstance(value, Mapping):
            parts[key] = value
        else:
            yield _line(key, value, "")
    for part, values in parts.items():
        yield f"\n[{table}.{part}]"
        for key, value in values.items():
            yield _line(key, value, "")


def _line(key: str, value: object, comment: str, *, rounded: bool = False) -> str:
    text = f"{key if _NAME.fullmatch(key) else json.dumps(key)} = {_toml(value, rounded)}"
    return f"{text:{_COMMENT_COLUMN}}# {comment}" if comment else text


def _toml(value: object, rounded: bool) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.5g}" if rounded else repr(value)
        case str():
            return json.dumps(printable(value), ensure_ascii=False)
        case list() | tuple():
            return f"[{', '.join(_toml(each, rounded) for each in value)}]"
    return str(value)
