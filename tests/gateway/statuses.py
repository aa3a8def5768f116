"""A status with a figure in every field, and fake models whose status it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from throttllem.core.clocks.gathering import HoldPlan
from throttllem.core.engine_state import Phase
from throttllem.core.forecast.margins import Cause, ClassAttainment
from throttllem.core.forecast.switch_latency import BandLatency
from throttllem.core.snapshot import Counts, EngineView
from throttllem.core.types import EngineSpec, FrequencyPlan, Reason, Slo, Verdict, VerdictKind
from throttllem.engines.base import Report
from throttllem.gateway.telemetry import dashboard, history
from throttllem.gateway.telemetry.status import (
    Ahead,
    Drift,
    Energy,
    EngineStatus,
    GatewayStatus,
    LengthStatus,
    ModelStatus,
    SloCounts,
    TableBand,
)

HOSTILE = '"\\</script><img src=x onerror=alert(1)>\n$&'
SPEC = EngineSpec(
    gpu="a100-40gb-sxm",
    model="llama-3-8b",
    tp=1,
    kv_blocks=2310,
    block_tokens=64,
    max_batch=64,
    max_context_tokens=8192,
    prefill_budget_tokens=8192,
    chunked=True,
    no_evict=False,
    clocks_mhz=(210, 810, 1410),
    idle_w=48.0,
    startup_s=20.0,
)
VIEW = EngineView(
    engine=0,
    tp=1,
    phase=Phase.SERVING,
    clock_mhz=1050,
    plan=FrequencyPlan(mhz=1065, why=Reason.LOWEST_FEASIBLE, binding=4182),
    running=17,
    pending=2,
    lost_requests=1,
    iteration=9001,
    external_sequences=3,
    switch_latency=(
        BandLatency(low_mhz=210, high_mhz=810, switches=31, median_s=0.009, assumed_s=0.014),
        BandLatency(low_mhz=1410, high_mhz=1410, switches=0, median_s=None, assumed_s=0.2),
    ),
)
UP = EngineStatus(
    name="a100-0",
    kind="simulated",
    gpu="a100-40gb-sxm",
    model="llama-3-8b",
    tp=1,
    state="up",
    starts=2,
    process_failures=1,
    notes=("trained at the first start",),
    spec=SPEC,
    view=VIEW,
    clock_mhz=1050,
    clocks="on",
    advised_mhz=1065,
    limit_mhz=1050,
    held="power cap",
    unset="keeper: it closed the connection",
    kv_blocks=1234,
    report=Report(running=18, waiting=1, kv_blocks=1230),
    drift=Drift(batch=1.0, kv_blocks=-4.0, mean_batch=0.25, mean_kv_blocks=3.5, corrections=21),
    table=(
        TableBand(low_mhz=210, high_mhz=810, seconds_bias=1.12, watts_bias=0.97, factor=1.11),
        TableBand(low_mhz=1410, high_mhz=1410, seconds_bias=None, watts_bias=None, factor=1.0),
    ),
    energy=Energy(total_j=81_000.0, idle_j=9_000.0, top_j=100_000.0, advised_j=72_900.0, watts=187.0),
    ahead=Ahead(at_s=(0.0, 5.0, 12.0), batch=(17, 9, 1), kv_blocks=(1234, 1500, 90)),
    decision="one clock lower would violate an SLO",
)
DOWN = EngineStatus(
    name=HOSTILE, kind="openai", gpu="h100-80gb-sxm", model="llama-3-8b", tp=2, state="down", trouble=f"no {HOSTILE}"
)
MODEL = ModelStatus(
    names=("llama", "alias"),
    queue=5,
    held=2,
    hold=HoldPlan(hold_s=7.5, start_s=0.8, token_s=0.04, watts=210.0, watts_at_once=260.0),
    head=Verdict(kind=VerdictKind.WAIT, why=Reason.E2E, binding=4100),
    counts=Counts(arrived=1511, dispatched=1500, finished=1470, rejected=6, failed=7, lost=8),
    engines=(UP, DOWN),
    recent=SloCounts(with_slo=200, met=197, e2e_violated=2, tbt_violated=1),
    ever=SloCounts(with_slo=1400, met=1379, e2e_violated=12, tbt_violated=5, ttft_violated=4),
    length=LengthStatus(seen=1470, exceeded=0.094, mean_error_tokens=41.5),
    classes=(
        ClassAttainment(
            name="",
            asked=0.99,
            had=0.9875,
            had_recently=0.985,
            owed=1.5,
            ended=1400,
            learned=((Cause.MODEL, 0.0245), (Cause.LENGTH, 0.05), (Cause.LOAD, -0.01), (Cause.ADMISSION, 0.0)),
        ),
    ),
    prompt_tokens=350_000,
    generated_tokens=180_000,
)
STATUS = GatewayStatus(
    version="0.1.0",
    policy="throttllem",
    phase="serving",
    now_s=432.5,
    slo=Slo(e2e_s=12.5, tbt_s=0.2),
    models=(MODEL,),
    uncontrolled=13,
)
EMPTY = GatewayStatus(version="0.1.0", policy="triton", phase="draining", now_s=0.0, slo=Slo(), models=())


class Still:
    """Fake models; `gateway` is their status, and nothing else of them may be read."""

    def __init__(self, gateway: GatewayStatus = STATUS) -> None:
        self.gateway = gateway

    def status(self) -> GatewayStatus:
        return self.gateway

    def at(self, now_s: float) -> None:
        self.gateway = replace(self.gateway, now_s=now_s)


@pytest.fixture(autouse=True)
def status_of_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages and history read the status of `Still` models."""
    for module in (dashboard, history):
        monkeypatch.setattr(module, "gateway_status", lambda models: models.status())
