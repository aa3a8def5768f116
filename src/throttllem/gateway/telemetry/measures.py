"""A gateway's status as metrics: every gauge and counter with its name, its help_text and where it is read.

What is not known has no sample; a zero is a measured zero. Labels: engine, model (the first of its names), state,
slo, slo_class ("": that of requests which name none), cause, outcome, window, clocks_mhz (a band of clocks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from throttllem.core.snapshot import EngineView
from throttllem.gateway.telemetry.status import EngineStatus, GatewayStatus, ModelStatus

STATES = ("up", "starting", "down", "stalled")
_HZ_PER_MHZ = 1e6

ModelRead = Callable[[ModelStatus], float | None]
EngineRead = Callable[[EngineStatus], float | None]


def _of_view(read: Callable[[EngineView], float | None]) -> EngineRead:
    """Read from what the core knows of an engine; nothing where it does not know the engine."""
    return lambda engine: None if engine.view is None else read(engine.view)


def _hertz(mhz: float | None) -> float | None:
    return None if mhz is None else mhz * _HZ_PER_MHZ


# (name, help_text, how to read it); counters get their `_total` from the client library.
_MODEL_GAUGES: tuple[tuple[str, str, ModelRead], ...] = (
    ("throttllem_queue_requests", "Requests that wait, held ones too.", lambda model: model.queue),
    ("throttllem_held_requests", "Those of them that are held to run together.", lambda model: model.held),
    (
        "throttllem_hold_seconds",
        "How long requests that can wait are held at most; absent: they are not.",
        lambda model: None if model.hold is None else model.hold.hold_s,
    ),
    (
        "throttllem_length_exceeded_ratio",
        "Fraction of answers that outgrew their prediction.",
        lambda model: model.length.exceeded,
    ),
    (
        "throttllem_length_error_tokens",
        "Mean absolute error of the predicted length before inflation.",
        lambda model: model.length.mean_error_tokens,
    ),
    ("throttllem_recent_slo_requests", "Recent requests with an SLO.", lambda model: model.recent.with_slo),
    ("throttllem_recent_slo_met_requests", "Those of them that met all SLOs.", lambda model: model.recent.met),
)
_MODEL_COUNTERS: tuple[tuple[str, str, ModelRead], ...] = (
    ("throttllem_arrived_requests", "Requests under control.", lambda model: model.counts.arrived),
    ("throttllem_dispatched_requests", "Requests given to an engine.", lambda model: model.counts.dispatched),
    (
        "throttllem_retried_requests",
        "Requests that were tried once more, as their engine broke off before it gave a byte.",
        lambda model: model.counts.retried,
    ),
    ("throttllem_lost_requests", "Finished requests that were marked lost.", lambda model: model.counts.lost),
    ("throttllem_slo_requests", "Ended requests that had an SLO.", lambda model: model.ever.with_slo),
    ("throttllem_slo_met_requests", "Those of them that met all SLOs.", lambda model: model.ever.met),
    ("throttllem_prompt_tokens", "Prompt tokens of served requests.", lambda model: model.prompt_tokens),
    (
        "throttllem_cached_prompt_tokens",
        "Those of them that the engine reported not to have computed.",
        lambda model: model.cached_prompt_tokens,
    ),
    ("throttllem_generated_tokens", "Tokens of answers.", lambda model: model.generated_tokens),
    (
        "throttllem_estimated_outputs",
        "Answers of which the engine gave no count: a token an event.",
        lambda model: model.estimated_outputs,
    ),
    (
        "throttllem_estimated_prompts",
        "Prompts whose tokens were estimated, not counted.",
        lambda model: model.estimated_prompts,
    ),
    (
        "throttllem_core_faults",
        "Events at which the control core raised an exception.",
        lambda model: model.core_faults,
    ),
    (
        "throttllem_engine_rebuilds",
        "Engines that were connected again because the control core failed at their events.",
        lambda model: model.engine_rebuilds,
    ),
    ("throttllem_length_predictions", "Answers that predictions were held against.", lambda model: model.length.seen),
)
_ENGINE_GAUGES: tuple[tuple[str, str, EngineRead], ...] = (
    ("throttllem_engine_up", "1 while the engine is up.", lambda engine: engine.state == "up"),
    ("throttllem_clock_hertz", "Clock in force.", lambda engine: _hertz(engine.clock_mhz)),
    (
        "throttllem_planned_clock_hertz",
        "Clock that the core decided on.",
        _of_view(lambda view: None if view.plan is None else _hertz(view.plan.mhz)),
    ),
    (
        "throttllem_top_clock_hertz",
        "Highest clock in use.",
        lambda engine: None if engine.spec is None else _hertz(engine.spec.clocks_mhz[-1]),
    ),
    ("throttllem_power_watts", "Power of all GPUs of the engine.", lambda engine: engine.energy.watts),
    (
        "throttllem_energy_saving_ratio",
        "Estimate: fraction of the top clock's energy that was not taken.",
        lambda engine: engine.energy.saved,
    ),
    (
        "throttllem_dry_run_saving_ratio",
        "Estimate: fraction of the energy that the dry run's clocks would not have taken.",
        lambda engine: engine.energy.would_save,
    ),
    (
        "throttllem_prior_saving_ratio",
        "Before any profile, from the catalogue's law: fraction of the energy that other clocks would not have taken.",
        lambda engine: engine.energy.prior.saving if engine.energy.prior else None,
    ),
    (
        "throttllem_prior_saving_low_ratio",
        "The low end of its range.",
        lambda engine: engine.energy.prior.low if engine.energy.prior else None,
    ),
    (
        "throttllem_prior_saving_high_ratio",
        "The high end of its range.",
        lambda engine: engine.energy.prior.high if engine.energy.prior else None,
    ),
    (
        "throttllem_energy_measured",
        "1 where joules and watts are those of real GPUs (NVML), 0 where a model computes them.",
        lambda engine: engine.clocks != "simulated",
    ),
    ("throttllem_dry_run_clock_hertz", "Clock that a dry run would set.", lambda engine: _hertz(engine.advised_mhz)),
    (
        "throttllem_clock_limit_hertz",
        "GPUs follow no higher than this now: power cap, heat, or another controller.",
        lambda engine: _hertz(engine.limit_mhz),
    ),
    (
        "throttllem_clocks_set",
        "1 while clocks are set on real GPUs, 0 in a dry run or while they are left alone.",
        lambda engine: None if engine.clocks == "simulated" else engine.clocks == "on" and engine.unset is None,
    ),
    ("throttllem_running_requests", "Requests that generate.", _of_view(lambda view: view.running)),
    ("throttllem_pending_requests", "Dispatched, no token yet.", _of_view(lambda view: view.pending)),
    ("throttllem_lost_running_requests", "Running and marked lost.", _of_view(lambda view: view.lost_requests)),
    ("throttllem_kv_blocks", "KV blocks in use by the scoreboard.", lambda engine: engine.kv_blocks),
    (
        "throttllem_kv_capacity_blocks",
        "KV blocks that the engine has.",
        lambda engine: engine.spec.kv_blocks if engine.spec and "kv_blocks" not in engine.spec.unknown else None,
    ),
    (
        "throttllem_max_batch_requests",
        "Most requests that the engine runs at once.",
        lambda engine: engine.spec.max_batch if engine.spec and "max_batch" not in engine.spec.unknown else None,
    ),
    (
        "throttllem_reported_running_sequences",
        "Sequences that run, as the engine reports.",
        lambda engine: engine.report.running if engine.report else None,
    ),
    (
        "throttllem_reported_waiting_sequences",
        "Sequences that wait inside, as the engine reports.",
        lambda engine: engine.report.waiting if engine.report else None,
    ),
    (
        "throttllem_reported_kv_blocks",
        "KV blocks in use, as the engine reports.",
        lambda engine: engine.report.kv_blocks if engine.report else None,
    ),
    (
        "throttllem_external_sequences",
        "Sequences of other clients in the engine.",
        _of_view(lambda view: view.external_sequences),
    ),
    (
        "throttllem_table_beyond_bounds",
        "1 while the bias of the table is beyond what is corrected: maximum clock.",
        _of_view(lambda view: view.beyond_table),
    ),
    ("throttllem_drift_requests", "Batch: engine minus scoreboard, last.", lambda engine: engine.drift.batch),
    ("throttllem_drift_kv_blocks", "KV: engine minus scoreboard, last.", lambda engine: engine.drift.kv_blocks),
    (
        "throttllem_mean_drift_requests",
        "Batch: mean distance of engine and scoreboard.",
        lambda engine: engine.drift.mean_batch,
    ),
    (
        "throttllem_mean_drift_kv_blocks",
        "KV: mean distance of engine and scoreboard.",
        lambda engine: engine.drift.mean_kv_blocks,
    ),
)
_ENGINE_COUNTERS: tuple[tuple[str, str, EngineRead], ...] = (
    ("throttllem_engine_starts", "Processes of the engine that the gateway started.", lambda engine: engine.starts),
    (
        "throttllem_engine_process_failures",
        "Starts of them that failed or were late, and ends that the gateway did not ask for.",
        lambda engine: engine.process_failures,
    ),
    ("throttllem_energy_joules", "Energy of all GPUs, idle time included.", lambda engine: engine.energy.total_j),
    ("throttllem_idle_energy_joules", "The part with no request.", lambda engine: engine.energy.idle_j),
    (
        "throttllem_uncontrolled_energy_joules",
        "The part in which only requests without control ran.",
        lambda engine: engine.energy.uncontrolled_j,
    ),
    (
        "throttllem_top_clock_energy_joules",
        "Estimate: the same work at the top clock, idle time included.",
        lambda engine: engine.energy.top_j,
    ),
    (
        "throttllem_dry_run_energy_joules",
        "Estimate: the same work at the dry run's clocks, idle time included.",
        lambda engine: engine.energy.advised_j,
    ),
    ("throttllem_corrections", "Corrections of the scoreboard.", lambda engine: engine.drift.corrections),
    ("throttllem_iterations", "Iterations since the engine is up.", _of_view(lambda view: view.iteration)),
)


@dataclass(frozen=True, slots=True)
class StatusCollector(Collector):
    """One status, for one scrape."""

    status: GatewayStatus

    def collect(self) -> Iterator[Metric]:
        """All families."""
        status = self.status
        yield from _gateway(status)
        models = [(model.title, model) for model in status.models]
        for name, help_text, read in _MODEL_GAUGES:
            yield _filled(
                GaugeMetricFamily(name, help_text, labels=("model",)), [((at,), read(one)) for at, one in models]
            )
        for name, help_text, read in _MODEL_COUNTERS:
            yield _filled(
                CounterMetricFamily(name, help_text, labels=("model",)), [((at,), read(one)) for at, one in models]
            )
        yield from _outcomes(status.models)
        yield from _classes(status.models)
        engines = [((one.name, model.title), one) for model in status.models for one in model.engines]
        for name, help_text, of_engine in _ENGINE_GAUGES:
            gauge = GaugeMetricFamily(name, help_text, labels=("engine", "model"))
            yield _filled(gauge, [(at, of_engine(one)) for at, one in engines])
        for name, help_text, of_engine in _ENGINE_COUNTERS:
            counter = CounterMetricFamily(name, help_text, labels=("engine", "model"))
            yield _filled(counter, [(at, of_engine(one)) for at, one in engines])
        yield from _states(engines)
        yield from _tables(engines)
        yield from _switches(engines)


Family = GaugeMetricFamily | CounterMetricFamily


def _filled(family: Family, samples: list[tuple[tuple[str, ...], float | None]]) -> Metric:
    """The family with these samples, absent ones left out."""
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, float(value))
    return family


def _gateway(status: GatewayStatus) -> Iterator[Metric]:
    yield InfoMetricFamily("throttllem_build", "What runs here.", {"version": status.version})
    yield InfoMetricFamily("throttllem_policy", "The policy that sets clocks.", {"policy": status.policy})
    yield GaugeMetricFamily("throttllem_uptime_seconds", "Since the gateway started.", status.now_s)
    yield GaugeMetricFamily("throttllem_draining", "1 while no new request is taken.", status.phase == "draining")
    slo = status.slo
    slos = [(("e2e",), slo.e2e_s), (("tbt",), slo.tbt_s), (("ttft",), slo.ttft_s)]
    default = GaugeMetricFamily("throttllem_slo_seconds", "SLO of a request that names none.", labels=("slo",))
    yield _filled(default, [*slos])
    help_text = "Requests passed on without control."
    yield CounterMetricFamily("throttllem_uncontrolled_requests", help_text, status.uncontrolled)


def _outcomes(models: tuple[ModelStatus, ...]) -> Iterator[Metric]:
    """What has a label besides the model."""
    ended = CounterMetricFamily("throttllem_requests", "Requests that ended.", labels=("model", "outcome"))
    met = GaugeMetricFamily("throttllem_slo_attainment_ratio", "Met all SLOs.", labels=("model", "window"))
    violations = CounterMetricFamily("throttllem_slo_violations", "SLOs violated.", labels=("model", "slo"))
    recent = GaugeMetricFamily("throttllem_recent_slo_violations", "SLOs violated recently.", labels=("model", "slo"))
    for model in models:
        title, counts = model.title, model.counts
        outcomes = (("finished", counts.finished), ("rejected", counts.rejected), ("failed", counts.failed))
        _filled(ended, [((title, outcome), count) for outcome, count in outcomes])
        windows = (("recent", model.recent), ("ever", model.ever))
        _filled(met, [((title, window), over.attainment) for window, over in windows])
        for family, over in ((violations, model.ever), (recent, model.recent)):
            by_slo = (("e2e", over.e2e_violated), ("tbt", over.tbt_violated), ("ttft", over.ttft_violated))
            _filled(family, [((title, slo), count) for slo, count in by_slo])
    yield from (ended, met, violations, recent)


def _classes(models: tuple[ModelStatus, ...]) -> Iterator[Metric]:
    """Attainment asked and had by SLO class; classes are those of the configuration."""
    of_class = ("model", "slo_class")
    asked = GaugeMetricFamily("throttllem_slo_asked_ratio", "Of served requests: shall meet all SLOs.", labels=of_class)
    had = GaugeMetricFamily("throttllem_slo_had_ratio", "Of served requests: met all.", labels=(*of_class, "window"))
    owed = GaugeMetricFamily("throttllem_slo_owed_requests", "Violations beyond what was asked.", labels=of_class)
    margin = GaugeMetricFamily(
        "throttllem_learned_margin_ratio", "Time budget kept free, as learned by cause.", labels=(*of_class, "cause")
    )
    for model in models:
        for one in model.classes:
            at = (model.title, one.name)
            _filled(asked, [(at, one.asked)])
            _filled(had, [((*at, "recent"), one.had_recently), ((*at, "ever"), one.had)])
            _filled(owed, [(at, one.owed)])
            _filled(margin, [((*at, cause.value), learned) for cause, learned in one.learned])
    yield from (asked, had, owed, margin)


def _states(engines: list[tuple[tuple[str, str], EngineStatus]]) -> Iterator[Metric]:
    state = GaugeMetricFamily("throttllem_engine_state", "1 at the state.", labels=("engine", "model", "state"))
    about = InfoMetricFamily("throttllem_engine", "What an engine is.", labels=("engine", "model"))
    for at, engine in engines:
        _filled(state, [((*at, name), engine.state == name) for name in STATES])
        about.add_metric(
            at, {"kind": engine.kind, "gpu": engine.gpu, "catalogue_model": engine.model, "tp": str(engine.tp)}
        )
    yield from (state, about)


def _tables(engines: list[tuple[tuple[str, str], EngineStatus]]) -> Iterator[Metric]:
    """How far performance tables are from their engines, by clock band: at most four of them."""
    labels = ("engine", "model", "clocks_mhz")
    seconds, watts, factor = (
        GaugeMetricFamily(f"throttllem_table_{name}_ratio", help_text, labels=labels)
        for name, help_text in (
            ("seconds_bias", "Seconds of decoding over those of the table."),
            ("watts_bias", "Watts of decoding over those of the table."),
            ("factor", "By which the table's seconds are corrected."),
        )
    )
    for at, engine in engines:
        for band in engine.table:
            where = (*at, f"{band.low_mhz}-{band.high_mhz}")
            _filled(seconds, [(where, band.seconds_bias)])
            _filled(watts, [(where, band.watts_bias)])
            _filled(factor, [(where, band.factor)])
    yield from (seconds, watts, factor)


def _switches(engines: list[tuple[tuple[str, str], EngineStatus]]) -> Iterator[Metric]:
    """How long switches of clocks take, by the clock band of the target."""
    labels = ("engine", "model", "clocks_mhz")
    assumed = GaugeMetricFamily("throttllem_switch_assumed_seconds", "A switch to a clock, as planned.", labels=labels)
    took = GaugeMetricFamily("throttllem_switch_median_seconds", "A recent switch, as measured.", labels=labels)
    measured = CounterMetricFamily("throttllem_measured_switches", "Switches that were measured.", labels=labels)
    for at, engine in engines:
        for band in engine.view.switch_latency if engine.view else ():
            where = (*at, f"{band.low_mhz}-{band.high_mhz}")
            _filled(assumed, [(where, band.assumed_s)])
            _filled(took, [(where, band.median_s)])
            _filled(measured, [(where, band.switches)])
    yield from (assumed, took, measured)
