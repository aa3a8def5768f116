"""One load through one proxy, and what rounds of it say. The clients have a core of their own, and so has the proxy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import uvloop

from tools.evaluation.proxies import Proxy
from tools.evaluation.quiet import on_core
from tools.evaluation.streams import Load, run

CLIENTS, PROXY = 0, 1
"""The cores: engine and clients share one, what is measured has the other."""
_WARM_S, _SPREAD_S, _PAUSE_S = 1.5, 1.0, 0.5
_PATIENCE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEstimator:
    """`streams` at once, each request `tokens` long at `tokens_per_s`; `together`: those of a step in one burst."""

    streams: int
    tokens_per_s: float
    tokens: int
    together: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one proxy did in one round: time to the first token, tokens in `seconds`, and its processor's seconds."""

    p50_ms: float
    p99_ms: float
    requests: int
    tokens: int
    seconds: float
    cpu_s: float
    failed: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens streamed a second."""
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """Tokens streamed in a second of a core's work."""
        return self.tokens / self.cpu_s if self.cpu_s else float("nan")


Rounds = dict[str, list[Round]]


def one_round(proxy: Proxy, load: Load, seconds: float) -> Round:
    """One load through one proxy, from the clients' core."""
    load.api_key = proxy.api_key
    with on_core(CLIENTS):
        heard = uvloop.run(run(load, warm_s=_WARM_S, seconds=seconds, spread_s=_SPREAD_S, cpu_s=proxy.cpu_s))
    _settle(proxy)
    firsts_ms = 1e3 * np.array(heard.first_s or [np.nan])
    return Round(
        p50_ms=float(np.quantile(firsts_ms, 0.5)),
        p99_ms=float(np.quantile(firsts_ms, 0.99)),
        requests=len(heard.first_s),
        tokens=heard.tokens,
        seconds=heard.seconds,
        cpu_s=heard.cpu_s,
        failed=len(heard.failed),
    )


def _settle(proxy: Proxy) -> None:
    """Wait until it has done with what was broken off, or it would be in the next one's round."""
    for _ in range(_PATIENCE):
        before_s = proxy.cpu_s()
        time.sleep(_PAUSE_S)
        if proxy.cpu_s() - before_s < 0.1 * _PAUSE_S:
            return


def median(rounds: Sequence[Round], figure: Callable[[Round], float]) -> float:
    """The median of one figure over the rounds."""
    return statistics.median(figure(each) for each in rounds)


def added(rounds: Sequence[Round], direct: Sequence[Round], figure: Callable[[Round], float]) -> float:
    """The median of what one figure is above that of the direct way in the same round."""
    pairs = zip(rounds, direct, strict=True)
    return statistics.median(figure(one) - figure(other) for one, other in pairs)


def plain(rounds: Rounds) -> dict[str, list[dict[str, Any]]]:
    """Every round, for the JSON file."""
    return {name: [asdict(each) for each in found] for name, found in rounds.items()}
