"""The SLO of a request from its headers: a class by name, and single targets in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from throttllem.core.types import Slo
from throttllem.did_you_mean import did_you_mean
from throttllem.openai_api.errors import invalid

CLASS_HEADER = "x-slo-class"
TARGETS = {"x-slo-ttft-ms": "ttft_s", "x-slo-tbt-ms": "tbt_s", "x-slo-tpot-ms": "tbt_s", "x-slo-e2e-ms": "e2e_s"}
"""Headers of single targets, and the field of Slo that each sets. TPOT is the field's other name for the mean TBT."""
_HEADERS = (*TARGETS, CLASS_HEADER)
METRICS_HEADER = "x-throttllem-metrics"


def read_slo(headers: Mapping[str, str], default: Slo, classes: Mapping[str, Slo]) -> Slo:
    """The SLO of a request: its class, else `default`, with the targets that it sets itself. Raises ApiError 400."""
    named = {header: text for header, text in headers.items() if header.startswith("x-slo-")}
    if not named:
        return default
    name = named.pop(CLASS_HEADER, None)
    if name is not None and name not in classes:
        known = ", ".join(sorted(classes)) or "none are configured"
        raise invalid(f"{CLASS_HEADER}: {name!r} is not known here; known classes: {known}", CLASS_HEADER)
    slo = default if name is None else classes[name]
    if unknown := next((header for header in named if header not in TARGETS), None):
        raise invalid(f"{unknown[:80]} is not a known SLO header; {did_you_mean(unknown, _HEADERS)}", unknown[:80])
    if {"x-slo-tbt-ms", "x-slo-tpot-ms"} <= named.keys():
        raise invalid("x-slo-tbt-ms and x-slo-tpot-ms are the same target; send one of them", "x-slo-tpot-ms")
    targets: dict[str, Any] = {TARGETS[header]: _seconds(header, text) for header, text in named.items()}
    return replace(slo, **targets)


def _seconds(header: str, text: str) -> float:
    try:
        seconds = float(text) / 1000
    except ValueError:
        seconds = math.nan
    if "_" in text or not 0 < seconds < math.inf:
        raise invalid(f"{header}: {text[:40]!r} must be a positive number of milliseconds", header)
    return seconds
