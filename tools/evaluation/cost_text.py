"""What `cost` found, in words and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tools.evaluation.rounds import RetryEstimator, Round, Rounds, added, median
from tools.evaluation.section import Table

TARGET_P50_MS, TARGET_P99_MS = 1.5, 8.0
"""At 100 streams."""
_FIRSTS: tuple[Callable[[Round], float], ...] = (lambda each: each.p50_ms, lambda each: each.p99_ms)
_TEXT = """\
Clients that cost next to nothing ask an engine that costs next to nothing, directly and through three proxies: nginx as
a plain proxy without buffering (one worker, connections kept), LiteLLM's proxy (one worker, no database), and the
gateway with everything that a user has: policy `throttllem` with a trained table, E2E, TBT and TTFT promises, the
length predictor, the flight recorder, `/tokenize` asked for every prompt (each prompt is another), `/metrics` of the
engine scraped. The engine sends its first token after 20 ms and the others at a fixed pace per stream, or, where it
says so, all streams' tokens in one burst per step, as an engine does that batches. Engine and clients share one core,
the proxy under test has the other. {alone} All proxies are up; they take turns, {rounds} rounds of {seconds:g} s.
Each figure is the median over the rounds of the difference to the direct way in the same round. Each stream asks
again 50 ms after an answer has ended, so at 100 streams some 50 requests a second begin while the others stream.

Tokens per core: tokens streamed per second of processor time that the proxy took, all its processes together, at 100
streams of 25 tokens/s (nobody but LiteLLM is short of time there) and at full load, where the engine sends as fast as
it is read and chunks come several at a time.

Where a first token's time goes at 100 streams (medians, seen from inside): 0.1 ms to read the request, 0.3 ms for
`/tokenize`, 0.4 ms for the core's decision, 0.4 ms to send it on and to hear of the reply, 0.1 ms to pass it on, and
0.5 ms before and after, in sockets and in the loop's queue. The code runs cold: after a few idle milliseconds the same
decision takes two to three times as long as in a tight loop (0.2 ms).

What was made cheap, and what it was before (same machine, side by side, policy and load as above; added ms at p50 and
p99, at 100 streams; a round with a full collection of garbage had a p99 of 90 ms more):

| | 1 stream | 100 streams | 100, bursts |
| --- | --- | --- | --- |
| before | +4.0, +4.5 | +3.4, +6.0 | +2.8, +6.6 |
| after | +2.1, +2.4 | +2.0, +3.2 | +1.5, +4.7 |

An HTTP/1.1 client of our own in place of a general one (0.35 ms a request when cold, and there are two); a chunk goes
to its client before the core hears of its tokens; what tells of progress waits for the loop's next round, and what
belongs to one iteration is one event; a request is on its way before the clocks are planned; what start-up made is
frozen, so that no collection looks through it again.
"""
_ALONE = {
    True: "All of them run in Linux's real-time class, so that what else the machine did stays out.",
    False: "The machine does not allow the real-time class: what else it did is in the figures.",
}


def text(*, alone: bool, rounds: int, seconds: float) -> str:
    """How it was measured. `alone`: in the real-time class."""
    return _TEXT.format(alone=_ALONE[alone], rounds=rounds, seconds=seconds)


def added_table(found: Mapping[RetryEstimator, Rounds]) -> Table:
    """Time to the first token, above the direct way."""
    rows = []
    for load, rounds in found.items():
        direct = rounds["direct"]
        about = f"{load.streams}{', in one burst per step' if load.together else ''}"
        rows.append((about, "direct: whole", *(f"{median(direct, at):.2f}" for at in _FIRSTS), ""))
        for name in list(rounds)[1:]:
            figures = [added(rounds[name], direct, at) for at in _FIRSTS]
            failed = sum(each.failed for each in rounds[name])
            met = _met(figures) if name == "throttllem" and load.streams == 100 else ""
            told = f"{met}{f' {failed} failed' if failed else ''}".strip()
            rows.append((about, name, *(f"{figure:+.2f}" for figure in figures), told))
    caption = (
        "Time to the first token that a proxy adds, ms. Targets at 100 streams: "
        f"p50 below {TARGET_P50_MS:g}, p99 below {TARGET_P99_MS:g}."
    )
    return Table(caption=caption, head=("streams", "", "p50", "p99", ""), rows=rows)


def _met(figures: list[float]) -> str:
    return "met" if figures[0] < TARGET_P50_MS and figures[1] < TARGET_P99_MS else "missed"


def core_table(paced: Rounds, full: Rounds) -> Table:
    """What one core streams."""
    rows = [
        (
            name,
            f"{median(paced[name], lambda one: one.tokens_per_cpu_s):,.0f}",
            f"{median(full[name], lambda one: one.tokens_per_cpu_s):,.0f}",
            f"{median(full[name], lambda one: one.tokens_per_s):,.0f}",
        )
        for name in full
    ]
    head = ("", "tokens per core second, paced", "tokens per core second, full load", "tokens/s, full load")
    return Table(caption="Tokens that one core streams.", head=head, rows=rows)


def real_table(found: Mapping[int, Rounds]) -> Table:
    """In front of vLLM."""
    rows = [
        (
            str(streams),
            name,
            f"{median(each, lambda one: one.p50_ms):.1f}",
            f"{median(each, lambda one: one.p99_ms):.1f}",
            f"{median(each, lambda one: one.tokens_per_s):,.0f}",
        )
        for streams, rounds in found.items()
        for name, each in rounds.items()
    ]
    caption = (
        "In front of vLLM on the CPU (tiny model), 40 tokens a request. vLLM's engine has one core; its API server, "
        "the proxy and the clients share the other, so whatever a proxy needs is missing elsewhere."
    )
    head = ("streams", "", "first token p50, ms", "p99, ms", "tokens/s")
    return Table(caption=caption, head=head, rows=rows)
