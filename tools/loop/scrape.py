"""Figures from a gateway's `/metrics`: histograms between two looks, gauges. Knows nothing of what they stand for."""

from __future__ import annotations

import urllib.request

from throttllem.engines.capacity import samples, total

TIMEOUT_S = 10.0


def page(url: str) -> bytes:
    """The gateway's metrics as they are now."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
        found: bytes = answer.read()
    return found


def gauge(page_of: bytes, name: str) -> float | None:
    """None: it has no sample."""
    return total(page_of, name)


def count(before: bytes, after: bytes, name: str) -> int:
    """What a histogram observed between the two."""
    return round((total(after, f"{name}_count") or 0.0) - (total(before, f"{name}_count") or 0.0))


def quantile(before: bytes, after: bytes, name: str, share: float) -> float | None:
    """Of what a histogram observed between the two, straight within a bucket; None: nothing.

    In the last bucket, which has no end, its beginning.
    """
    old, buckets = dict(_buckets(before, name)), _buckets(after, name)
    grown = [(edge, seen - old.get(edge, 0.0)) for edge, seen in buckets]
    if not grown or grown[-1][1] <= 0:
        return None
    wanted, low, below = share * grown[-1][1], 0.0, 0.0
    for edge, seen in grown:
        if seen >= wanted:
            return low if edge == float("inf") else low + (edge - low) * (wanted - below) / (seen - below)
        low, below = edge, seen
    raise ValueError(f"{name}: its buckets do not add up")


def _buckets(page_of: bytes, name: str) -> list[tuple[float, float]]:
    """(upper edge, observations up to it) over all label sets, ascending."""
    found: dict[float, float] = {}
    for sample in samples(page_of, f"{name}_bucket"):
        edge = float(sample.labels["le"])
        found[edge] = found.get(edge, 0.0) + sample.value
    return sorted(found.items())
