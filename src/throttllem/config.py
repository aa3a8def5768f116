"""The one frozen tree of options, and the only reader of the environment.

Every option is written once, as a field of the dataclass that uses it; `changed` takes `name=value` texts for any of
them (`--set throttle.dwell_s=1`), refuses unknown names with the nearest known one and checks the type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from throttllem.core.admission import AdmissionOptions
from throttllem.core.autoscale import AutoscaleOptions
from throttllem.core.throttle import ThrottleOptions


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

    `p95_error` 0 is the oracle; `inflation` None stands for 1 + p95_error (the paper inflates, but not by how much is
    left open).
    """

    p95_error: float = 0.0
    inflation: float | None = None

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Log-normal scatter of one iteration: standard deviations of time and power.

    The data's own scatter is about 4 % in time and 5 % in power over whole runs (shared measurements); single
    iterations on an otherwise idle machine scatter less.
    """

    time: float = 0.02
    power: float = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingOptions:
    """The autoscaler's options; see `core.autoscale.AutoscaleOptions`."""

    interval_s: float = 10.0
    window_s: float = 30.0
    grace_s: float = 300.0
    headroom: float = 0.9

    def with_capacity(self, capacity_rps: dict[int, float]) -> AutoscaleOptions:
        """The core's options for engines of these characterised loads."""
        return AutoscaleOptions(
            capacity_rps=capacity_rps,
            interval_s=self.interval_s,
            window_s=self.window_s,
            grace_s=self.grace_s,
            headroom=self.headroom,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything that can be set about a simulation besides its scenario."""

    throttle: ThrottleOptions = field(default_factory=ThrottleOptions)
    admission: AdmissionOptions = field(default_factory=AdmissionOptions)
    autoscale: ScalingOptions = field(default_factory=ScalingOptions)
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
            if leaf.name not in ("policy", "fixed_mhz")  # a run's --policy says both
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
