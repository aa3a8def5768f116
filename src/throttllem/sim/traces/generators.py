"""Built-in traces: `azure-conv-like`, `azure-code-like`, `mooncake-like` (published statistics, no data), `poisson`.

Same name, options and seed give the same requests. Knows nothing of files.
"""

# How a trace is drawn.
#
# Arrivals are a doubly stochastic Poisson process. The rate is constant within an episode; episodes have exponentially
# distributed lengths, and the level of each is drawn from a gamma distribution of mean 1. The squared coefficient of
# variation of that level (`spread`) makes the bursts, `episode_s` their length. Given the rate over time, the number of
# requests is Poisson and their arrivals are independent, so they are placed evenly over the cumulative rate.
#
# A `day` of so many seconds warps the time: the rate swings between a minimum and a maximum once in each, as a cosine.
#
# Lengths: a workload is a mixture of kinds of request; within a kind, prompt and output lengths are independent, each
# drawn from a quantile curve whose knots are published quantiles.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from throttllem.did_you_mean import did_you_mean

MAX_REQUESTS = 10_000_000
"""The most requests that a generator makes: a wrong unit must not fill the memory."""


class TraceError(ValueError):
    """A trace that cannot be read, made or scaled; the message names file, line and field, or generator and option."""


class Arrays(NamedTuple):
    """One entry per request: arrival in seconds, prompt and output in tokens."""

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A distribution of token counts as (cumulative fraction, tokens) knots, straight in the logarithm between them."""

    knots: tuple[tuple[float, float], ...]

    def at(self, fraction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens (not rounded) at each cumulative fraction."""
        fractions, tokens = np.array(self.knots).T
        tokens_at: NDArray[np.float64] = np.exp(np.interp(fraction, fractions, np.log(tokens)))
        return tokens_at

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Whole token counts, at least 1."""
        return np.maximum(np.rint(self.at(rng.random(size))), 1).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of request in a workload: its share of the requests, and independent lengths within it."""

    share: float
    prompt: Quantiles
    output: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A generator: default mean rate (requests/s) and length (s), burstiness, and the kinds of request.

    `spread`: squared coefficient of variation of the rate (0: plain Poisson); `episode_s`: mean length of an episode.
    """

    rate_rps: float
    seconds: float
    spread: float
    episode_s: float
    kinds: tuple[Kind, ...]


# Azure LLM inference trace 2023 (Azure/AzurePublicDataset, CC-BY-4.0). Counts and means: conv 19,366 requests in about
# an hour, prompt 1,155, output 211; code 8,819, 2,048, 28. Medians (Splitwise, Patel et al., ISCA 2024, section III):
# 1,020 and 129; 1,500 and 13.
# The knots between are rounded quantiles, bent to meet those means and medians; spread and episode are rounded fits to
# how the variance of the request count grows with the window. Chat falls into three kinds by length of prompt, of
# which only the middle one is answered at length; in code, prompt and output are independent.
_CONV = Workload(
    rate_rps=19_366 / 3600,
    seconds=3600.0,
    spread=0.045,
    episode_s=90.0,
    kinds=(
        Kind(
            share=0.44,
            prompt=Quantiles(knots=((0, 3), (0.02, 40), (0.1, 170), (0.25, 300), (0.4, 380), (0.85, 410), (1, 950))),
            output=Quantiles(knots=((0, 8), (0.05, 16), (0.15, 50), (0.5, 90), (0.77, 127), (0.95, 212), (1, 460))),
        ),
        Kind(
            share=0.38,
            prompt=Quantiles(knots=((0, 955), (0.16, 1020), (0.5, 1080), (0.75, 1135), (0.95, 1220), (1, 1320))),
            output=Quantiles(knots=((0, 90), (0.1, 290), (0.3, 385), (0.6, 408), (0.9, 470), (0.98, 610), (1, 1000))),
        ),
        Kind(
            share=0.18,
            prompt=Quantiles(knots=((0, 1320), (0.15, 1800), (0.35, 2800), (0.51, 4060), (0.97, 4110), (1, 5500))),
            output=Quantiles(knots=((0, 7), (0.1, 38), (0.5, 66), (0.75, 105), (0.95, 190), (1, 480))),
        ),
    ),
)
_CODE = Workload(
    rate_rps=8_819 / 3600,
    seconds=3600.0,
    spread=5.0,
    episode_s=6.0,
    kinds=(
        Kind(
            share=1.0,
            prompt=Quantiles(
                knots=(
                    *((0, 3), (0.05, 75), (0.15, 230), (0.25, 570), (0.5, 1500)),
                    *((0.75, 2700), (0.9, 5150), (0.955, 7400), (1, 7437)),
                )
            ),
            output=Quantiles(
                knots=(
                    *((0, 6), (0.05, 6), (0.25, 9), (0.5, 13), (0.75, 23)),
                    *((0.9, 53), (0.95, 82), (0.99, 225), (0.999, 700), (1, 1900)),
                )
            ),
        ),
    ),
)

# Mooncake's synthetic trace (kvcache-ai/Mooncake, Apache-2.0; Qin et al., FAST 2025): 3,993 requests in 1,022 s, with
# prompts of 15,325 and outputs of 149 tokens on the mean. The knots are its rounded quantiles, prompts above 98,304
# tokens left out. The variance of its count is that of a Poisson process, from windows of 2 s to 30 s. Prompt and
# output are drawn independently, and no prefix is shared.
_MOONCAKE = Workload(
    rate_rps=3_993 / 1022,
    seconds=1022.0,
    spread=0.0,
    episode_s=1.0,
    kinds=(
        Kind(
            share=1.0,
            prompt=Quantiles(
                knots=(
                    *((0, 13), (0.05, 22), (0.25, 277), (0.4, 6_000), (0.5, 11_600), (0.6, 15_900)),
                    *((0.75, 23_200), (0.9, 38_600), (0.95, 48_900), (0.99, 66_500), (1, 98_304)),
                )
            ),
            output=Quantiles(
                knots=(
                    *((0, 1), (0.05, 2), (0.25, 11), (0.5, 69), (0.75, 250)),
                    *((0.9, 389), (0.95, 519), (0.99, 768), (1, 893)),
                )
            ),
        ),
    ),
)
_SWING = 0.8
"""How far the rate of a `day` swings about its mean: 0.2 to 1.8 of it, as production services do (ServeGen, 2025)."""

_WORKLOADS = MappingProxyType({"azure-conv-like": _CONV, "azure-code-like": _CODE, "mooncake-like": _MOONCAKE})
_POISSON = "poisson"
NAMES = (*_WORKLOADS, _POISSON)
"""The generators, as `--trace` names them."""


def generate(name: str, options: Mapping[str, str], seed: int) -> Arrays:
    """The requests of one generator; `options` are the texts after the colon, and a `seed` among them wins.

    All take `seconds`, `rate` (mean requests/s), `seed`, `day` (seconds of a compressed day, over which the rate rises
    from its minimum and falls back; the mean holds for whole days) and `longest` (tokens: requests with longer prompts
    are left out); `poisson` also `input` and `output` (tokens of every request; 1,023 and 99 by default), and it runs
    at 2 requests/s for 300 s by default. Raises TraceError for an unknown option, a value out of range, and options
    that give no request or more than MAX_REQUESTS.
    """
    known = ("seconds", "rate", "seed", "day", "longest") + (("input", "output") if name == _POISSON else ())
    for key in options:
        if key not in known:
            raise TraceError(f"{name}: unknown option {key!r}; {did_you_mean(key, known)}")
    seed = _whole(name, options, "seed", seed, least=0)
    if seed < 0:
        raise TraceError(f"{name}: seed = {seed}: must be 0 or more")
    workload = _poisson(options) if name == _POISSON else _WORKLOADS[name]
    seconds = _positive(name, options, "seconds", workload.seconds)
    rate_rps = _positive(name, options, "rate", workload.rate_rps)
    if rate_rps * seconds > MAX_REQUESTS:
        raise TraceError(f"{name}: rate {rate_rps:g} for {seconds:g} seconds is over {MAX_REQUESTS:,} requests")
    rng = np.random.default_rng(seed)
    arrival_s = _arrivals(workload, rate_rps, seconds, rng)
    if "day" in options:
        arrival_s = _over_a_day(arrival_s, _positive(name, options, "day", seconds), seconds)
    if not arrival_s.size:
        raise TraceError(f"{name}: rate {rate_rps:g} for {seconds:g} seconds and seed {seed} gives no request")
    kind_of = rng.choice(len(workload.kinds), arrival_s.size, p=[kind.share for kind in workload.kinds])
    prompt, output = np.empty(arrival_s.size, np.int64), np.empty(arrival_s.size, np.int64)
    for index, kind in enumerate(workload.kinds):
        of_kind = np.flatnonzero(kind_of == index)
        prompt[of_kind] = kind.prompt.draw(rng, of_kind.size)
        output[of_kind] = kind.output.draw(rng, of_kind.size)
    fits = prompt <= _whole(name, options, "longest", int(prompt.max()), least=1)
    if not fits.any():
        raise TraceError(f"{name}: longest {options['longest']} leaves no request")
    return Arrays(arrival_s[fits], prompt[fits], output[fits])


def _poisson(options: Mapping[str, str]) -> Workload:
    """Every request alike, and a rate that does not change."""
    lengths = (_whole(_POISSON, options, *default, least=1) for default in (("input", 1023), ("output", 99)))
    prompt, output = (Quantiles(knots=((0.0, tokens), (1.0, tokens))) for tokens in lengths)
    kind = Kind(share=1.0, prompt=prompt, output=output)
    return Workload(rate_rps=2.0, seconds=300.0, spread=0.0, episode_s=1.0, kinds=(kind,))


def _arrivals(workload: Workload, rate_rps: float, seconds: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Sorted arrivals in [0, seconds): a Poisson count, placed evenly over the cumulative rate.

    The levels are scaled to a mean of exactly 1 over the run, so the mean rate is `rate_rps` for every seed.
    """
    placed = np.sort(rng.random(rng.poisson(rate_rps * seconds)))
    if workload.spread == 0:
        return placed * seconds
    episodes = int(seconds / workload.episode_s * 1.5) + 64
    lengths_s = rng.exponential(workload.episode_s, episodes)
    while lengths_s.sum() < seconds:
        lengths_s = np.append(lengths_s, rng.exponential(workload.episode_s, episodes))
    edges_s = np.concatenate(([0.0], np.minimum(np.cumsum(lengths_s), seconds)))
    shape = 1 / workload.spread
    levels = rng.gamma(shape, 1 / shape, lengths_s.size)
    cumulative = np.concatenate(([0.0], np.cumsum(levels * np.diff(edges_s))))
    arrival_s: NDArray[np.float64] = np.interp(placed * cumulative[-1], cumulative, edges_s)
    return arrival_s


def _over_a_day(arrival_s: NDArray[np.float64], day_s: float, seconds: float) -> NDArray[np.float64]:
    """The same arrivals in time that runs fast where the day's rate is high: the cumulative rate of
    1 - _SWING cos(2 pi t / day), inverted on a grid of a thousand points a day or more.
    """
    time_s = np.linspace(0.0, seconds, 1 + max(1000, math.ceil(1000 * seconds / day_s)))
    turn = 2 * math.pi / day_s
    cumulative = time_s - _SWING / turn * np.sin(turn * time_s)
    warped_s: NDArray[np.float64] = np.interp(arrival_s, cumulative * (seconds / cumulative[-1]), time_s)
    return warped_s


def _positive(name: str, options: Mapping[str, str], key: str, default: float) -> float:
    text = options.get(key)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise TraceError(f"{name}: {key} = {text!r}: must be a positive number")
    return value


def _whole(name: str, options: Mapping[str, str], key: str, default: int, *, least: int) -> int:
    text = options.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise TraceError(f"{name}: {key} = {text!r}: must be a whole number of {least} or more, of at most nine digits")
    return int(text)
