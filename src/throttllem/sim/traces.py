"""Request traces: when requests come and how long they are, from a file or a generator.

`load_trace` takes every form of `--trace`; a `Trace` can be scaled to a peak rate and cut. Sorted by arrival, the first
at 0. Knows nothing of engines, SLOs or virtual time.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from throttllem.sim import generators
from throttllem.sim.generators import TraceError
from throttllem.sim.trace_files import read_trace_file

__all__ = ["PEAK_WINDOW_S", "Trace", "TraceError", "load_trace"]

PEAK_WINDOW_S = 60.0
"""The window of the busiest minute (`--peak-rps`)."""
_INSTANT_S = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival; the three arrays are read-only and of one length, at least 1.

    `name` is short (a file's stem, a generator's name); `source` is the text that named the trace.
    """

    name: str
    source: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]

    def __post_init__(self) -> None:
        for array in (self.arrival_s, self.prompt_tokens, self.output_tokens):
            array.flags.writeable = False

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return self.arrival_s.size

    @property
    def mean_context_tokens(self) -> int:
        """Tokens of a typical running request: its prompt and half of its answer."""
        return round(float((self.prompt_tokens + self.output_tokens / 2).mean()))

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last; 0 where all come at once."""
        return float(self.arrival_s[-1])

    @property
    def peak_rps(self) -> float:
        """Requests/s in the busiest window [t, t + 60 s), over every t.

        A trace shorter than 60 s has its requests over its duration instead (over 60 s if they all come at once).
        """
        if _INSTANT_S < self.duration_s < PEAK_WINDOW_S:
            return self.requests / self.duration_s
        ends = np.searchsorted(self.arrival_s, self.arrival_s + PEAK_WINDOW_S, side="left")
        return int((ends - np.arange(self.requests)).max()) / PEAK_WINDOW_S

    @property
    def sha256(self) -> str:
        """Digest of the requests alone (not of the names), for cache keys."""
        digest = hashlib.sha256(b"trace 1\n")
        for array, kind in ((self.arrival_s, "<f8"), (self.prompt_tokens, "<i8"), (self.output_tokens, "<i8")):
            digest.update(array.astype(kind).tobytes())
        return digest.hexdigest()

    def scaled(self, *, peak_rps: float) -> Trace:
        """The trace with its arrival times stretched or squeezed so that `peak_rps` of the result is the one asked for.

        A window holds a whole number of requests, so the result is the greatest multiple of 1/60 that is not above
        `peak_rps`. Raises TraceError for a rate under 1/60, and where so many requests share one instant (1 ns) that no
        stretching parts them.
        """
        if not 1 / PEAK_WINDOW_S <= peak_rps < math.inf:
            raise TraceError(f"peak rate {peak_rps:g} requests/s: must be at least 1/60 (one request a minute)")
        # At most k requests in every window of 60 s means: request i + k comes 60 s or more after request i. The exact
        # factor is therefore that of the tightest such pair, and no search is needed.
        k = math.floor(PEAK_WINDOW_S * peak_rps + 1e-9)
        if self.requests <= k:
            together = self.duration_s <= _INSTANT_S
            return self if together else self._stretched(self.requests / (peak_rps * self.duration_s))
        tightest_s = float((self.arrival_s[k:] - self.arrival_s[:-k]).min())
        if tightest_s <= _INSTANT_S:
            raise TraceError(f"{self.name}: over {k} requests come at one instant: no scaling makes {peak_rps:g} rps")
        # The rounding of a product may put a pair a hair inside 60 s again.
        return self._stretched(PEAK_WINDOW_S / tightest_s * (1 + 1e-12))

    def cut(self, seconds: float) -> Trace:
        """The requests that arrive before `seconds`. Raises TraceError unless it is positive."""
        if not seconds > 0:
            raise TraceError(f"seconds = {seconds:g}: must be a positive number")
        kept = slice(int(np.searchsorted(self.arrival_s, seconds, side="left")))
        return replace(
            self,
            arrival_s=self.arrival_s[kept],
            prompt_tokens=self.prompt_tokens[kept],
            output_tokens=self.output_tokens[kept],
        )

    def _stretched(self, factor: float) -> Trace:
        return replace(self, arrival_s=self.arrival_s * factor)


def load_trace(spec: str, *, seconds: float | None = None, peak_rps: float | None = None, seed: int = 0) -> Trace:
    """The trace that `spec` names: `generator[:key=value,...]`, or the path of an Azure CSV or a Mooncake JSONL.

    First scaled to `peak_rps` (busiest 60 s), then cut to `seconds`. `seed` is for generators, whose own `seed=`
    wins. A file is known by its content; rows out of order are sorted by arrival, the order of equals kept. Raises
    TraceError with what to mend.
    """
    name, _, options = spec.partition(":")
    if name in generators.NAMES:
        arrays = generators.generate(name, _options(name, options), seed)
    else:
        path = Path(spec)
        name, arrays = path.stem, read_trace_file(path)
    order = np.argsort(arrays.arrival_s, kind="stable")
    arrival_s = arrays.arrival_s[order]
    trace = Trace(
        name=name,
        source=spec,
        arrival_s=arrival_s - arrival_s[0],
        prompt_tokens=arrays.prompt_tokens[order],
        output_tokens=arrays.output_tokens[order],
    )
    trace = trace if peak_rps is None else trace.scaled(peak_rps=peak_rps)
    return trace if seconds is None else trace.cut(seconds)


def _options(name: str, text: str) -> dict[str, str]:
    """`a=1,b=2` as a mapping."""
    found: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key in found:
            raise TraceError(f"{name}: option {item!r}: must be key=value, each key once")
        found[key] = value
    return found
