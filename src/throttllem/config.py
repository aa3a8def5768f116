"""The one frozen tree of options, and the only reader of the environment.

Every option is written once, as a field of the dataclass that uses it; `changed` takes `name=value` texts for any of
them (`--set throttle.dwell_s=1`), refuses unknown names with the nearest known one and checks the type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from throttllem.core.admission import AdmissionOptions
from throttllem.core.clocks.policy import ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.types import check

_RESOLVED = ("policy", "fixed_mhz", "capacity_rps")
"""What a run's --policy and the characterisation say."""


class OptionError(ValueError):
    """An option that does not exist or does not hold such a value; the message says what would do."""


class Environment(BaseSettings):
    """What is read from the environment: `THROTTLLEM_CACHE_DIR`, `THROTTLLEM_WORKERS`, `THROTTLLEM_DEBUG`."""

    model_config = SettingsConfigDict(env_prefix="THROTTLLEM_", frozen=True)

    cache_dir: Path = Path("~/.cache/throttllem")
    """Where trained tables and characterised engines are kept."""
    workers: int = Field(default=2, ge=1, le=64)
    """Policies that are simulated side by side."""
    debug: bool = False
    """Show where an error came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """How answers' lengths are predicted in simulation.

    `predictor` is "oracle" or "max-tokens" (knows nothing). `p95_error` is the oracle's relative error at p95;
    `inflation` None stands for 1 + p95_error (the paper inflates and leaves open by how much).
    """

    predictor: Literal["oracle", "max-tokens"] = "oracle"
    p95_error: float = 0.0
    inflation: float | None = None

    def __post_init__(self) -> None:
        check("length", p95_error=(self.p95_error, 0, 0.99), inflation=(self.factor, 0.1, 100))

    @property
    def factor(self) -> float:
        """What every prediction is multiplied by."""
        return 1.0 + self.p95_error if self.inflation is None else self.inflation


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the simulated engine batches. The defaults are TensorRT-LLM's: whole prompts, blocks of 64 tokens, as many
    requests as the KV cache holds now (its MAX_UTILIZATION; `no_evict` is its GUARANTEED_NO_EVICT).

    `chunked` with `block_tokens` 16 is vLLM's way. `max_tokens` None: the longest answer of the trace, rounded up to a
    power of two, stands for the limit that clients ask for.
    """

    block_tokens: int = 64
    max_batch: int = 256
    prefill_budget_tokens: int = 8192
    chunked: bool = False
    no_evict: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check("engine", block_tokens=(self.block_tokens, 1, 1024), max_batch=(self.max_batch, 1, 4096))
        check("engine", prefill_budget_tokens=(self.prefill_budget_tokens, 16, 1 << 20))
        check("engine", max_tokens=(1 if self.max_tokens is None else self.max_tokens, 1, 1 << 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Log-normal scatter of one iteration: standard deviations of time and power.

    The data's own scatter is about 4 % in time and 5 % in power over whole runs (shared measurements); single
    iterations on an otherwise idle machine scatter less.
    """

    time: float = 0.02
    power: float = 0.03

    def __post_init__(self) -> None:
        check("noise", time=(self.time, 0, 1), power=(self.power, 0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything that can be set about a simulation besides its scenario."""

    throttle: ThrottleOptions = field(default_factory=ThrottleOptions)
    admission: AdmissionOptions = field(default_factory=AdmissionOptions)
    autoscale: AutoscaleOptions = field(default_factory=AutoscaleOptions)
    length: LengthOptions = field(default_factory=LengthOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    noise: Noise = field(default_factory=Noise)


def changed(options: Options, settings: Iterable[str]) -> Options:
    """The options with every `section.name=value` of `settings` put in. Raises OptionError."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        names = path.strip().split(".")
        known = [
            f"{part.name}.{leaf.name}"
            for part in fields(options)
            for leaf in fields(getattr(options, part.name))
            if leaf.name not in _RESOLVED
        ]
        if not equals or path.strip() not in known:
            near = difflib.get_close_matches(path.strip(), known, n=3, cutoff=0.4) or known
            raise OptionError(f"option {setting!r}: write section.name=value; did you mean {', '.join(near)}?")
        section = getattr(options, names[0])
        options = replace(options, **{names[0]: replace(section, **{names[1]: _parsed(section, names[1], text)})})
    return options


def _parsed(section: Any, name: str, text: str) -> Any:
    assert is_dataclass(section)
    value = None if text.strip().lower() == "none" else text.strip()
    wanted = {key: kind for key, kind in type(section).__init__.__annotations__.items()}[name]
    try:
        return TypeAdapter(wanted).validate_python(value)
    except ValidationError as error:
        raise OptionError(f"option {name} = {text!r}: {error.errors()[0]['msg']}") from error
