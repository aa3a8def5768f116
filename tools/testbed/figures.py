"""Figures of one run of a client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Milliseconds, and generated tokens per second of the whole run. None: this client does not report it.

    TTFT is over requests, ITL over gaps between chunks, TPOT over requests' means of all gaps after the first token.
    """

    requests: int
    errors: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    tpot_p50_ms: float | None
    tokens_per_s: float


def percentiles_ms(seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p99; None where there is nothing."""
    if not len(seconds):
        return None, None
    p50, p99 = np.percentile(np.asarray(seconds) * 1e3, (50, 99))
    return float(p50), float(p99)
