"""What the energy of a run comes to: kWh, CO2 and money, per million tokens and per year, by the factors in use.

GPUs alone: no host, no cooling. A year is the trace over and over, each time as long as the baseline's run
took: the same number of requests for every policy, also for those that end later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from throttllem.config import CostOptions
from throttllem.sim.result import RunResult

_J_PER_KWH = 3.6e6
_YEAR_S = 365.0 * 24.0 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One run. None where no token was generated, or no time passed."""

    kwh: float
    co2_kg: float
    price: float
    currency: str
    kwh_per_million_tokens: float | None
    co2_g_per_million_tokens: float | None
    price_per_million_tokens: float | None
    kwh_per_year: float | None
    co2_kg_per_year: float | None
    price_per_year: float | None


def cost(run: RunResult, options: CostOptions, baseline: RunResult) -> Cost:
    """The cost of a run's energy. Million tokens are generated tokens; years count in runs of `baseline`."""
    kwh = run.energy_j / _J_PER_KWH
    million = kwh / run.generated_tokens * 1e6 if run.generated_tokens else None
    year = kwh * _YEAR_S / baseline.duration_s if baseline.duration_s > 0 else None
    co2_kg, price = options.co2_g_per_kwh / 1e3, options.price_per_kwh
    return Cost(
        kwh=kwh,
        co2_kg=kwh * co2_kg,
        price=kwh * price,
        currency=options.currency,
        kwh_per_million_tokens=million,
        co2_g_per_million_tokens=None if million is None else million * options.co2_g_per_kwh,
        price_per_million_tokens=None if million is None else million * price,
        kwh_per_year=year,
        co2_kg_per_year=None if year is None else year * co2_kg,
        price_per_year=None if year is None else year * price,
    )


def cost_options(scenario: Mapping[str, Any]) -> CostOptions:
    """The factors of a scenario; the defaults where it states none."""
    return CostOptions(**scenario.get("options", {}).get("cost", {}))


def factors(options: CostOptions) -> str:
    """The factors as a sentence, with the sources of the defaults."""
    default = CostOptions()
    co2 = " (IEA, Electricity 2025: world average of 2024)" if options.co2_g_per_kwh == default.co2_g_per_kwh else ""
    same = (options.price_per_kwh, options.currency) == (default.price_per_kwh, default.currency)
    price = " (EIA: U.S. industrial average of 2023)" if same else ""
    return (
        f"CO2 at {options.co2_g_per_kwh:g} g/kWh{co2}, electricity at {options.price_per_kwh:g} {options.currency}/kWh"
        f"{price}; GPUs alone. A year: this trace over and over, each time as long as the "
        "baseline's run; as many requests for every policy."
    )
