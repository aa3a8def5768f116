"""The result of one run of one policy: the contract's figures, and the series that the report draws.

`RunResult.to_json()` is the `runs[]` entry of `simulate --json`. Knows nothing of how the run was made.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Mean and percentiles of one quantity in seconds; all None where nothing was measured."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SloOutcome:
    """The SLOs and the fraction of all requests that met them (rejected requests violate every SLO)."""

    e2e_s: float | None
    tbt_s: float | None
    ttft_s: float | None
    asked: float
    """The attainment that was asked of served requests: `least-energy` learns its margins for it."""
    attainment: float
    e2e_attainment: float
    tbt_attainment: float
    ttft_attainment: float
    completed_attainment: float
    """Fraction of the completed requests that met every SLO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionError:
    """Mean relative error of the projection in force against the engine's own figures, over all iterations."""

    batch: float
    kv: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Time series in equal bins of the run; every list has one entry per bin, None where nothing ran.

    Clock, batch and KV are those of an engine that takes new requests (of several the mean while they are busy); watts
    are of every GPU that counts.
    """

    time_s: list[float]
    clock_mhz: list[float | None]
    power_w: list[float]
    batch: list[float | None]
    batch_projected: list[float | None]
    kv_blocks: list[float | None]
    kv_projected: list[float | None]
    queue: list[float]
    tp: list[int | None]
    """GPUs that are up and counted, shadows included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distributions:
    """The samples that the report draws as distributions."""

    e2e_s: list[float]
    """One per completed request; of a long run evenly ranked ones."""
    tpot_s: list[float]
    """One per completed request of two tokens or more; of a long run evenly ranked ones."""
    tbt_edges_s: list[float]
    """Edges of the histogram of single gaps; one longer than the counts."""
    tbt_counts: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One policy on one trace."""

    policy: str
    requests: int
    completed: int
    rejected: int
    lost: int
    prompt_tokens: int
    generated_tokens: int
    duration_s: float
    energy_j: float
    idle_energy_j: float
    saved_estimate: float | None
    """Fraction saved against the maximum clock as a gateway would estimate it (`core.clocks.savings_estimate`). None:
    there was no performance table, or the engine's size changes."""
    tokens_per_joule: float
    mean_clock_mhz: float
    busy_s_by_mhz: dict[int, float]
    """Seconds of iterations at each clock, over all engines."""
    clock_switches: int
    preemptions: int
    ttft_s: Quantiles
    tbt_s: Quantiles
    tpot_s: Quantiles
    e2e_s: Quantiles
    queue_s: Quantiles
    slo: SloOutcome
    projection_error: ProjectionError | None
    """None for a policy that does not project (triton, fixed)."""
    decision_s: Quantiles
    sizes: list[tuple[float, int]]
    """(seconds, tp) of the engine that takes new requests, at each change; none for a pool."""
    engines: list[tuple[float, dict[int, int]]]
    """(seconds, how many by tp) of the engines of a pool that are up, at each change; none without a pool."""
    rejections: dict[str, int]
    """How many requests were rejected, or failed with their engine, by reason."""
    series: Series
    distributions: Distributions

    def to_json(self) -> dict[str, object]:
        """The contract's entry: everything but the series and distributions."""
        entry = asdict(self)
        del entry["series"], entry["distributions"]
        return entry
