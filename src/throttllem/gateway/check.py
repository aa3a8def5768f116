"""`serve --check`: the resolved configuration, where each value came from, and what it would do. Changes nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from throttllem.config import Options, ServerOptions
from throttllem.core.clocks.policy import ClockPolicy
from throttllem.core.forecast.performance_table import PerformanceTable
from throttllem.core.options import ControllerOptions
from throttllem.engines.base import Connected, EngineError
from throttllem.files import WriteError, writable_dir
from throttllem.gateway.build import Gateway, build_gateway
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.http.server import bind
from throttllem.gpu.hardware import HardwareGpu, Mode, check_apart
from throttllem.gpu.keeper_client import keeper_status
from throttllem.gpu.zeusd import reach
from throttllem.option_sources import leaves

_REACH_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the answer. `mark`: "ok", "--" (to be known), "!!" (to be mended); `fatal`: serve would not start."""

    mark: str
    text: str
    fatal: bool = False


async def check_configuration(options: Options, origins: dict[str, str], cache_dir: Path) -> list[Finding]:
    """Everything worth saying, in the order in which `serve` would come to it."""
    findings = [
        *_values(options, origins),
        *_ports(options),
        *_access(options),
        *_folders(options),
        *_promises(options),
    ]
    try:
        gateway = build_gateway(options, cache_dir, version="", now=time.monotonic, learn=False)
    except (ValueError, OSError) as error:
        return [*findings, Finding(mark="!!", text=str(error), fatal=True)]
    return [*findings, *await _engines(gateway, options, origins)]


def verdict(findings: Sequence[Finding]) -> tuple[int, str]:
    """The exit code and the last line: 0 without any "!!", 1 if serve would start all the same, 2 if it would not."""
    wrong = sum(finding.mark == "!!" for finding in findings)
    if any(finding.fatal for finding in findings):
        return 2, f"{wrong} to mend; serve would not start"
    return (1, f"{wrong} to mend; serve would start all the same") if wrong else (0, "nothing to mend")


def _values(options: Options, origins: dict[str, str]) -> Iterator[Finding]:
    """Every option that was set, and where."""
    for path, value in leaves(options):
        if path in origins:
            yield Finding(mark="ok", text=f"{path} = {value}   ({origins[path]})")
    yield Finding(mark="--", text="everything else has its default (docs/reference/configuration.md)")


def _ports(options: Options) -> Iterator[Finding]:
    try:
        bind(options.server).close()
    except OSError as error:
        yield Finding(mark="!!", text=str(error), fatal=True)
        return
    server = options.server
    yield Finding(mark="ok", text=f"would listen on {server.host}:{server.port}")
    if server.metrics_port is not None:
        where = f"{server.metrics_host}:{server.metrics_port}"
        yield Finding(mark="ok", text=f"metrics and dashboard on {where}, where no key is asked for")


def _access(options: Options) -> Iterator[Finding]:
    server = options.server
    if door := _keyless(server):
        yield Finding(mark="!!", text=door)
    elif server.api_keys:
        yield Finding(mark="ok", text=f"{len(server.api_keys)} API keys: a request must carry one of them")
    else:
        yield Finding(mark="ok", text="no API keys: everybody on this machine may ask")
    if door := _public_metrics(server):
        yield Finding(mark="--", text=door)


def open_doors(server: ServerOptions) -> Iterator[str]:
    """Where others than this machine may ask without a key."""
    yield from filter(None, (_keyless(server), _public_metrics(server)))


def _keyless(server: ServerOptions) -> str | None:
    if server.api_keys or _is_loopback(server.host):
        return None
    return f"no API keys, and {server.host} is not loopback: everybody who reaches it may ask"


def _public_metrics(server: ServerOptions) -> str | None:
    if server.metrics_port is None or _is_loopback(server.metrics_host):
        return None
    return f"{server.metrics_host} is not loopback: everybody who reaches it may see metrics and the dashboard"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _folders(options: Options) -> Iterator[Finding]:
    state = options.state_dir.expanduser()
    try:
        writable_dir(state)
    except WriteError as error:
        yield Finding(mark="!!", text=f"state_dir: {error}", fatal=True)
        return
    yield Finding(mark="ok", text=f"what is learned of answers' lengths is kept in {state}")
    recorder = options.recorder
    if recorder.enabled:
        folder = (recorder.folder or options.state_dir / "flight").expanduser()
        most = recorder.files * recorder.file_bytes / 2**20
        yield Finding(mark="ok", text=f"flight recorder: {folder}, at most {most:.0f} MiB per model")


def _promises(options: Options) -> Iterator[Finding]:
    for name, slo in (("by default", options.slo), *((f"class {name}", slo) for name, slo in options.classes.items())):
        parts = [
            f"{part[:-2].upper()} {getattr(slo, part):g} s"
            for part in ("e2e_s", "tbt_s", "ttft_s")
            if getattr(slo, part)
        ]
        yield Finding(mark="ok" if parts else "--", text=f"promise {name}: {', '.join(parts) or 'none'}")


async def _engines(gateway: Gateway, options: Options, origins: dict[str, str]) -> list[Finding]:
    findings = []
    for model in gateway.models.served:
        aware = model.driver.controller.options.slo_aware
        scales = model.driver.controller.options.autoscale is not None
        largest = max(link.tp for link in model.driver.links)
        for link in model.driver.links:
            findings += await _engine(link, model.driver.controller.options, options)
            findings += await _hardware(link, options, origins)
            if link.tp < largest and not scales:
                findings.append(_never_started(link, options.policy))
            if aware and link.tp not in model.driver.controller.options.tables:
                findings.append(_no_table(link))
            table = model.driver.controller.options.tables.get(link.tp)
            if table is not None and not table.clocks_measured:
                findings.append(_no_clock_axis(link))
    try:
        check_apart(gateway.hardware)
    except ValueError as error:
        findings.append(Finding(mark="!!", text=str(error), fatal=True))
    return findings


async def _engine(link: Backend, core: ControllerOptions, options: Options) -> list[Finding]:
    try:
        async with asyncio.timeout(_REACH_S):
            connected = await link.engine.connect()
    except TimeoutError:
        return [Finding(mark="!!", text=f"engine {link.name}: no answer within {_REACH_S:g} s")]
    except EngineError as error:
        return [Finding(mark="!!", text=f"engine {link.name}: {error}; serve would wait for it")]
    finally:
        if link.close is not None:
            await link.close()
    return [Finding(mark="ok", text=_described(link, connected, core, options)), *_notes(link, connected)]


def _described(link: Backend, connected: Connected, core: ControllerOptions, options: Options) -> str:
    spec, clocks = connected.spec, connected.spec.clocks_mhz
    table = core.tables.get(link.tp)
    if table is not None:
        clocks = table.clocks_mhz
    chosen = f"would choose among {len(clocks)} clocks, {clocks[0]} to {clocks[-1]} MHz,"
    if isinstance(link.gpu, HardwareGpu) and link.gpu.mode is Mode.OFF:
        chosen = "would choose no clock, and plan with the top one"
    elif core.throttle.policy is ClockPolicy.FIXED:
        chosen = f"would keep to {core.throttle.fixed_mhz} MHz"
    elif core.throttle.policy is ClockPolicy.TOP or (core.slo_aware and _without_choice(link, table)):
        chosen = "would keep to the top clock"
    return (
        f"engine {link.name} serves {', '.join(connected.models)}: {spec.kv_blocks} KV blocks of {spec.block_tokens} "
        f"tokens, {spec.max_batch} requests, context {spec.max_context_tokens}; policy {options.policy} {chosen} "
        f"of {'a simulated ' if link.clock.mode == 'simulated' else ''}{link.catalogue_gpu}"
    )


def _without_choice(link: Backend, table: PerformanceTable | None) -> bool:
    """Whether no table tells one clock from another; that of a simulated engine is made at the first start."""
    return link.kind != "simulated" if table is None else not table.clocks_measured


async def _hardware(link: Backend, options: Options, origins: dict[str, str]) -> list[Finding]:
    """Real GPUs are found and read, never set. Whether clocks would be off, advised or on is said in any case."""
    gpu = link.gpu
    if not isinstance(gpu, HardwareGpu):
        text = f"engine {link.name}: clocks are simulated: it names no GPUs (engines.N.gpus, --gpus)"
        return [Finding(mark="--", text=text)]
    try:
        async with gpu:
            reading = gpu.read()
    except (OSError, ValueError) as error:
        return [Finding(mark="!!", text=f"engine {link.name}: {error}", fatal=True)]
    count = "1 GPU" if len(gpu.names) == 1 else f"{len(gpu.names)} GPUs"
    text = f"engine {link.name}: {count} at {reading.clock_mhz} MHz, {reading.watts:.0f} W"
    why = f"clocks.mode = {gpu.mode.value}, {origins.get('clocks.mode', 'the default')}"
    return [Finding(mark="ok", text=text), await _clocks(link.name, gpu, options, why)]


async def _clocks(name: str, gpu: HardwareGpu, options: Options, why: str) -> Finding:
    """Which mode an engine's clocks would run in, and why."""
    match gpu.mode:
        case Mode.OFF:
            return Finding(mark="ok", text=f"engine {name}: clocks would be off ({why}): left alone")
        case Mode.DRY_RUN:
            text = f"engine {name}: clocks would be advised ({why}): decided, recorded and shown, never set"
            return Finding(mark="ok", text=text)
    try:
        mark, text = await _setter(gpu, options)
    except OSError as error:
        return Finding(mark="!!", text=f"engine {name}: clocks would only be advised (though {why}): {error}")
    return Finding(mark=mark, text=f"engine {name}: clocks would be on ({why}): {text}")


async def _setter(gpu: HardwareGpu, options: Options) -> tuple[str, str]:
    """The mark, and how clocks would be set. Raises OSError where they would not be."""
    if (zeusd := options.clocks.zeusd) is not None:
        await asyncio.to_thread(reach, zeusd)
        return "ok", f"set through zeusd at {zeusd}"
    status = await keeper_status(options.clocks.keeper)
    if missing := [uuid for uuid in gpu.uuids if uuid not in status["allowed"]]:
        raise OSError(f"the keeper was not given --gpu {', '.join(missing)}")
    text, top = f"set through the keeper at {options.clocks.keeper}", gpu.ladder_mhz[-1]
    low, high = (pick(status["allowed"][uuid][end] for uuid in gpu.uuids) for end, pick in enumerate((max, min)))
    if not any(low <= clock <= high for clock in gpu.ladder_mhz):
        return "!!", f"{text}, which may set {low} to {high} MHz, where these GPUs have no clock: mend its --gpu"
    if high < top:
        return "--", f"{text}, at most {high} of {top} MHz: its --gpu allows no more"
    if taken := [f"{uuid} ({status['held'][uuid]['by']})" for uuid in gpu.uuids if uuid in status["held"]]:
        return "--", f"{text}, once its present holder gives back {', '.join(taken)}"
    return "ok", text


def _notes(link: Backend, connected: Connected) -> Iterator[Finding]:
    for note in connected.notes:
        yield Finding(mark="--", text=f"engine {link.name}: {note}")


def _never_started(link: Backend, policy: str) -> Finding:
    return Finding(
        mark="!!",
        text=f"engine {link.name} would never be used: policy {policy} serves the largest size; {policy}+autoscale "
        "chooses among them",
    )


def _no_clock_axis(link: Backend) -> Finding:
    return Finding(
        mark="--",
        text=f"engine {link.name}: the clock axis of its table was not measured (a profile without --gpus, or of one "
        "clock): the maximum clock is kept, and no saving is estimated; profile again with --gpus and --clocks",
    )


def _no_table(link: Backend) -> Finding:
    if link.kind == "simulated":
        return Finding(
            mark="--", text=f"engine {link.name}: its performance table is trained at the first start (cached)"
        )
    return Finding(
        mark="--",
        text=f"engine {link.name} has no performance table: top clock, no admission by promises; "
        f"`throttllem profile --url ...`, `throttllem train`, then tables = FOLDER",
    )
